"""Offline generation under torchrun: the reference's tokens, in the order of the prompts."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.checkpoints import load_reference, reference_greedy, write_llama_checkpoint
from tests.support.paths import ROOT

PROMPTS = [[1, 2, 3], [4, 5]]


def generate(
    tmp_path: Path, model: Path, num_ranks: int, *options: str
) -> subprocess.CompletedProcess[str]:
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(num_ranks)]
    command = [
        sys.executable, *(torchrun if num_ranks > 1 else ()), "-m", "serve.llm",
        "--prompts", str(tmp_path / "in.jsonl"), "--output", str(tmp_path / "out.jsonl"),
        "--model", str(model), "--tokenizer", "none", "--num-blocks", "128", *options,
    ]  # fmt: skip
    return subprocess.run(
        command, cwd=ROOT, env=os.environ, capture_output=True, text=True, timeout=250, check=False
    )


def write_prompts(tmp_path: Path, count: int) -> list[list[int]]:
    rng = random.Random(31)
    prompts = [[rng.randrange(128) for _ in range(rng.randint(1, 40))] for _ in range(count)]
    lines = [json.dumps({"prompt": ids, "max_tokens": 8, "ignore_eos": True}) for ids in prompts]
    (tmp_path / "in.jsonl").write_text("\n".join(lines) + "\n")
    return prompts


def check(tmp_path: Path, model: Path, prompts: list[list[int]]) -> None:
    reference = load_reference(model)
    lines = (tmp_path / "out.jsonl").read_text().splitlines()
    for prompt, line in zip(prompts, map(json.loads, lines), strict=True):
        assert line["token_ids"] == list(reference_greedy(reference, prompt, 8))
        assert line["finish_reason"] == "length"


def test_two_ranks_return_the_references_tokens(tmp_path: Path) -> None:
    model = write_llama_checkpoint(tmp_path / "model", seed=5)
    prompts = write_prompts(tmp_path, 20)
    done = generate(tmp_path, model, 2)
    assert done.returncode == 0, done.stderr
    check(tmp_path, model, prompts)
    assert "20/20" in done.stderr, "no progress bar"


def test_close_is_bounded(tmp_path: Path) -> None:
    model = write_llama_checkpoint(tmp_path / "model", seed=5)
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
        "-m", "tests.support.close_beside_a_stopped_rank", "--model", str(model),
        "--tokenizer", "none", "--num-blocks", "64",
    ]  # fmt: skip
    done = subprocess.run(
        command, cwd=ROOT, env=os.environ, capture_output=True, text=True, timeout=250, check=False
    )
    assert "closed: no Goodbye within 10 s from rank 1" in done.stdout, done.stderr


@pytest.mark.slow
def test_tp_2_to_4_returns_the_references_tokens(tmp_path: Path) -> None:
    model = write_llama_checkpoint(tmp_path / "model", seed=5, num_heads=8, num_kv_heads=2)
    prompts = write_prompts(tmp_path, 12)
    done = generate(tmp_path, model, 6, "--replica-spec", "2,1", "4,1", "--partition-id", "1")
    assert done.returncode == 0, done.stderr
    check(tmp_path, model, prompts)


def test_a_missing_repetition_penalty_is_read_from_generation_config(tmp_path: Path) -> None:
    """The first three prompts set no penalty; the last three turn it off."""
    model = write_llama_checkpoint(tmp_path / "model", seed=5)
    file = model / "generation_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"repetition_penalty": 1.5}))
    prompts = write_prompts(tmp_path, 3)
    lines = [{"prompt": ids, "max_tokens": 24, "ignore_eos": True} for ids in prompts]
    lines += [line | {"repetition_penalty": 1.0} for line in lines]
    (tmp_path / "in.jsonl").write_text("\n".join(map(json.dumps, lines)))
    done = generate(tmp_path, model, 1, "--mode", "colocated")
    assert done.returncode == 0, done.stderr
    found = [json.loads(line)["token_ids"] for line in (tmp_path / "out.jsonl").open()]
    assert found[:3] != found[3:]
    reference = load_reference(model)
    for number, ids in enumerate(prompts * 2):
        expected = reference_greedy(reference, ids, 24, 1.5 if number < 3 else 1.0)
        assert found[number] == list(expected)


SCRIPT = """
import json, sys
from serve.llm import LLM

def refusal(**fields):
    try:
        llm.generate(prompts, **fields)
    except (TypeError, ValueError) as error:
        return [type(error).__name__, str(error)]

prompts = json.loads(sys.argv[2])
with LLM(model=sys.argv[1], tokenizer="none", num_blocks=128, mode="colocated") as llm:
    def generate(**fields):
        answers = llm.generate(prompts, progress=False, ignore_eos=True, **fields)
        return [answer.token_ids for answer in answers]

    json.dump({
        "default": generate(),
        "greedy": generate(temperature=0, top_p=0.5),
        "sampled": [generate(temperature=1.5, seed=seed, max_tokens=40) for seed in (1, 1, 2)],
        "unknown": refusal(tempreature=0),
        "range": refusal(top_p=1.5),
        "stop": refusal(stop="x"),
        "both": refusal(sampling=llm.config.sampling_defaults.params(max_tokens=1), seed=1),
    }, sys.stdout)
"""


def test_sampling_fields_as_keywords(tmp_path: Path) -> None:
    model = write_llama_checkpoint(tmp_path / "model", seed=5)
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(model), json.dumps(PROMPTS)],
        cwd=ROOT, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    reference = load_reference(model)
    assert found["default"] == [list(reference_greedy(reference, ids, 16)) for ids in PROMPTS]
    assert found["greedy"] == found["default"]
    first, again, other = found["sampled"]
    assert first == again
    assert first != other
    assert [len(token_ids) for token_ids in first] == [40, 40]
    assert found["unknown"][0] == "TypeError"
    assert "tempreature" in found["unknown"][1]
    assert found["range"] == ["ValueError", "top_p must be in (0, 1], got 1.5"]
    assert found["stop"] == [
        "ValueError",
        "stop needs a tokenizer, and the server runs without one",
    ]
    assert found["both"][0] == "TypeError"


def test_a_wrong_option_gives_one_error_line(tmp_path: Path) -> None:
    model = write_llama_checkpoint(tmp_path / "model", seed=5)
    write_prompts(tmp_path, 1)
    done = generate(tmp_path, model, 1, "--replica-spec", "3,1")
    assert done.returncode == 2
    errors = [line for line in done.stderr.splitlines() if line.startswith("serve: error:")]
    assert len(errors) == 1
    assert "--replica-spec" in errors[0]


def test_a_wrong_line_is_one_line(tmp_path: Path) -> None:
    model = write_llama_checkpoint(tmp_path / "model", seed=5)
    for weights in model.glob("*.safetensors"):
        weights.unlink()  # the line is refused before the weights are read
    prompts = tmp_path / "in.jsonl"
    prompts.write_text('{"prompt": [1]}\n{"prompt": [1], "temperature": 7}\n')
    done = generate(tmp_path, model, 2)
    assert done.returncode == 1, "torchrun's own"
    errors = [line for line in done.stderr.splitlines() if line.startswith("serve: error:")]
    assert errors == [f"serve: error: {prompts}:2: temperature must be in [0, 2], got 7"]
    assert not (tmp_path / "out.jsonl").exists()
