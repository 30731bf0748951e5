"""Offline generation under torchrun: the model's tokens, in the order of the prompts."""

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


def generate(
    tmp_path: Path, model: Path, num_ranks: int, *options: str
) -> subprocess.CompletedProcess[str]:
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node",
        str(num_ranks), "-m", "serve.llm", "--prompts", str(tmp_path / "in.jsonl"), "--output",
        str(tmp_path / "out.jsonl"), "--model", str(model), "--tokenizer", "none",
        "--num-blocks", "128", *options,
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


def test_a_batch_over_two_ranks(tmp_path: Path) -> None:
    model = write_llama_checkpoint(tmp_path / "model", seed=5)
    prompts = write_prompts(tmp_path, 20)
    done = generate(tmp_path, model, 2)
    assert done.returncode == 0, done.stderr
    check(tmp_path, model, prompts)
    assert "20/20" in done.stderr, "there is a progress bar"


@pytest.mark.slow
def test_tp_2_to_4(tmp_path: Path) -> None:
    model = write_llama_checkpoint(tmp_path / "model", seed=5, num_heads=8, num_kv_heads=2)
    prompts = write_prompts(tmp_path, 12)
    done = generate(tmp_path, model, 6, "--replica-spec", "2,1", "4,1", "--partition-id", "1")
    assert done.returncode == 0, done.stderr
    check(tmp_path, model, prompts)


def test_the_model_recommends_a_repetition_penalty(tmp_path: Path) -> None:
    """Where a line leaves it open; the reference is transformers with the same file."""
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


def test_a_wrong_option_is_one_line(tmp_path: Path) -> None:
    model = write_llama_checkpoint(tmp_path / "model", seed=5)
    write_prompts(tmp_path, 1)
    done = generate(tmp_path, model, 1, "--replica-spec", "3,1")
    assert done.returncode == 1, "torchrun's own"
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
