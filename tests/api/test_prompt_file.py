"""Prompt files of the offline command line: what a line may have, and where an error is."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from serve.api.prompt_file import FilePrompt, PromptFileError, read_prompt_file
from serve.config.sampling_defaults import SamplingDefaults
from serve.request import SamplingParams


def write(tmp_path: Path, *lines: str) -> Path:
    path = tmp_path / "prompts.jsonl"
    path.write_text("\n".join(lines) + "\n")
    return path


def read_one(tmp_path: Path, **fields: Any) -> FilePrompt:
    [prompt] = read_prompt_file(write(tmp_path, json.dumps(fields)))
    return prompt


def params(prompt: FilePrompt, *, has_tokenizer: bool = True) -> SamplingParams:
    defaults = SamplingDefaults(temperature=0.6, top_p=0.9, repetition_penalty=1.1)
    return prompt.sampling_params(defaults, vocab_size=100, has_tokenizer=has_tokenizer)


def test_a_line_is_greedy_by_default(tmp_path: Path) -> None:
    for fields in ({}, {"temperature": None, "max_tokens": None, "seed": None, "stop": None}):
        assert params(read_one(tmp_path, prompt="x", **fields)) == SamplingParams(
            max_tokens=16, temperature=0.0, top_p=0.9, repetition_penalty=1.1
        )


def test_a_line_may_have_every_sampling_parameter(tmp_path: Path) -> None:
    asked: dict[str, Any] = {
        "max_tokens": 9, "seed": -5, "temperature": 0.5, "top_p": 0.7, "top_k": 5, "min_p": 0.1,
        "presence_penalty": 1.0, "frequency_penalty": -1.0, "repetition_penalty": 1.2,
        "logit_bias": {"5": -100.0}, "stop": ["a", "b"], "stop_token_ids": [7],
        "include_stop_str_in_output": True, "skip_special_tokens": False, "ignore_eos": True,
        "min_tokens": 2,
    }  # fmt: skip
    assert asked.keys() == set(SamplingParams.__struct_fields__)
    expected = asked | {"logit_bias": {5: -100.0}, "stop": ("a", "b"), "stop_token_ids": (7,)}
    assert params(read_one(tmp_path, prompt=[1, 2], **asked)) == SamplingParams(**expected)


def test_blank_lines_count_but_are_skipped(tmp_path: Path) -> None:
    prompts = read_prompt_file(write(tmp_path, '{"prompt": "a"}', "", '{"prompt": [5]}'))
    assert [prompt.line.prompt for prompt in prompts] == ["a", [5]]
    assert [prompt.place.rpartition(":")[2] for prompt in prompts] == ["1", "3"]


PROMPT = "prompt must be a string or a list of at least one token id"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"prompt": "x", "temperature": 7}', "temperature must be in [0, 2], got 7"),
        ('{"prompt": "x", "max_tokens": "5"}', "max_tokens must be an integer"),
        ('{"prompt": "x", "temprature": 0}', "unknown field 'temprature'"),
        ('{"prompt": "x", "temprature": null}', "unknown field 'temprature'"),
        ('{"prompt": "x", "n": 2}', "unknown field 'n'"),
        ('{"prompt": "x", "echo": false}', "unknown field 'echo'"),
        ("{}", "prompt is required"),
        ('{"prompt": []}', f"{PROMPT}: it has 0 entries"),
        ('{"prompt": [1, "a"]}', f'{PROMPT}: prompt[1] is "a"'),
        ('{"prompt": [-1]}', f"{PROMPT}: prompt[0] is -1"),
        ('{"prompt": 5}', f"{PROMPT}: it is 5"),
        ("[1]", "the line must be a JSON object"),
    ],
)
def test_wrong_lines_are_named(tmp_path: Path, line: str, message: str) -> None:
    path = write(tmp_path, '{"prompt": "fine"}', "", line)
    with pytest.raises(PromptFileError) as caught:
        read_prompt_file(path)
    assert str(caught.value) == f"{path}:3: {message}"


@pytest.mark.parametrize("line", [b'{"prompt": "x"', b"x", b'{"prompt": "\xff"}', b"[" * 100_000])
def test_malformed_lines_are_named(tmp_path: Path, line: bytes) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_bytes(b'{"prompt": "fine"}\n' + line + b"\n")
    with pytest.raises(PromptFileError) as caught:
        read_prompt_file(path)
    assert str(caught.value).startswith(f"{path}:2: not valid JSON: ")
    assert "\n" not in str(caught.value)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(PromptFileError, match=r"nothing\.jsonl: No such file or directory$"):
        read_prompt_file(tmp_path / "nothing.jsonl")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"prompt": [99, 100]}, "prompt must have token ids below 100"),
        ({"prompt": "x"}, "prompt must be token ids without a tokenizer"),
        ({"prompt": [1], "stop": "x"}, "stop needs a tokenizer"),
        ({"prompt": [1], "stop_token_ids": [100]}, "stop_token_ids must have token ids below 100"),
        ({"prompt": [1], "min_tokens": 17}, "min_tokens must not exceed max_tokens, 16"),
    ],
)
def test_lines_that_the_model_cannot_serve(
    tmp_path: Path, fields: dict[str, Any], message: str
) -> None:
    with pytest.raises(PromptFileError) as caught:
        params(read_one(tmp_path, **fields), has_tokenizer=False)
    assert str(caught.value).startswith(f"{tmp_path}/prompts.jsonl:1: {message}")
