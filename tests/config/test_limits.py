"""The server's options for replicas and their limits."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from serve.config.limits import PhaseLimits
from serve.topology import ReplicaSpec
from tests.support.config_cases import model, parse, refusal

__all__ = ["model"]


# --- replicas -----------------------------------------------------------------------------------


def test_replica_spec(model: Path) -> None:
    config = parse(model, "--replica-spec 2,1 2,1 4,1 --partition-id 2", world_size=8)
    assert config.replica_specs == (ReplicaSpec(2), ReplicaSpec(2), ReplicaSpec(4))
    assert config.partition_id == 2
    assert config.notes == ()


def test_the_example_of_tropicals_readme(model: Path) -> None:
    config = parse(
        model,
        "--port 8012 --mode distserve --replica-spec 2,1 2,1 2,1 --partition-id 1 "
        "--prefill-max-num-seqs 256 --prefill-max-num-batched-tokens 8192 "
        "--prefill-gpu-memory-utilization 0.8 "
        "--decode-max-num-seqs 64 --decode-max-num-batched-tokens 8192 "
        "--decode-gpu-memory-utilization 0.8 --enable-chunked-prefill",
        world_size=6,
    )
    assert (config.port, config.replica_specs) == (8012, (ReplicaSpec(2),) * 3)
    assert (config.partition_id, config.colocated) == (1, False)
    assert config.prefill == PhaseLimits(256, 8192, 0.8)
    assert config.decode == PhaseLimits(64, 8192, 0.8)
    assert config.enable_chunked_prefill


@pytest.mark.parametrize(
    ("text", "world_size", "part"),
    [
        ("--replica-spec 2,1 2,1", 8, "needs 4 ranks in all, but torchrun started 8"),
        ("--replica-spec 4,1 2,1", 4, "needs 6 ranks in all, but torchrun started 4"),
        ("--replica-spec 1,2 1,1", 3, "pipeline parallelism (pp 2)"),
        ("--replica-spec 3,1 1,1", 4, "tp 3 does not divide the model's 8 query heads"),
        ("--replica-spec 2", 2, "'2' is not of the form TP,PP"),
        ("--replica-spec 0,1 2,1", 2, "'0,1' is not of the form TP,PP"),
        ("--replica-spec 1,00 1,1", 2, "'1,00' is not of the form TP,PP"),
        ("--replica-spec -1,1", 2, "--replica-spec"),
        ("--replica-spec 1,1,1", 2, "not of the form TP,PP"),
        ("--partition-id 0", 2, "--partition-id 0 is not between 1 and 1"),
        ("--partition-id 4", 4, "--partition-id 4 is not between 1 and 3"),
        ("--partition-id -1", 4, "--partition-id -1 is not between 1 and 3"),
        ("--partition-id 1", 1, "--partition-id needs at least two replicas"),
        ("--mode disaggregated", 1, "--mode disaggregated needs at least two replicas"),
        ("--mode distserve", 1, "--mode disaggregated needs at least two replicas"),
        ("--mode colocated --partition-id 1", 2, "--partition-id has no effect"),
        ("--mode colocated --kv-push-bytes 5", 2, "--kv-push-bytes has no effect"),
    ],
)
def test_replicas_refused(model: Path, text: str, world_size: int, part: str) -> None:
    assert part in refusal(model, text, world_size)


@pytest.mark.parametrize("phase", ["prefill", "decode"])
@pytest.mark.parametrize(
    "option", ["max-num-seqs 4", "max-num-batched-tokens 64", "gpu-memory-utilization 0.5"]
)
def test_overrides_refused_when_colocated(model: Path, phase: str, option: str) -> None:
    name = f"--{phase}-{option.split()[0]}"
    for text, world_size in (
        (f"--mode colocated --{phase}-{option}", 2),
        (f"--{phase}-{option}", 1),
    ):
        assert refusal(model, text, world_size).startswith(f"{name} has no effect")


# --- limits -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "prefill", "decode"),
    [
        ("--max-num-seqs 8", (8, 8192, 0.9), (8, 2048, 0.9)),
        ("--max-num-batched-tokens 512", (256, 512, 0.9), (256, 512, 0.9)),
        ("--max-num-batched-tokens 64", (64, 64, 0.9), (64, 64, 0.9)),
        ("--gpu-memory-utilization 1", (256, 8192, 1.0), (256, 2048, 1.0)),
        ("--prefill-max-num-seqs 2", (2, 8192, 0.9), (256, 2048, 0.9)),
        ("--max-num-seqs 8 --decode-max-num-seqs 32", (8, 8192, 0.9), (32, 2048, 0.9)),
        ("--prefill-max-num-batched-tokens 5", (5, 5, 0.9), (256, 2048, 0.9)),
        ("--prefill-max-num-batched-tokens 5 --max-num-seqs 8", (8, 5, 0.9), (8, 2048, 0.9)),
        ("--decode-gpu-memory-utilization 0.5", (256, 8192, 0.9), (256, 2048, 0.5)),
    ],
)
def test_plain_limits_and_overrides(
    model: Path,
    text: str,
    prefill: tuple[int, int, float],
    decode: tuple[int, int, float],
) -> None:
    config = parse(model, text)
    assert dataclasses.astuple(config.prefill) == prefill
    assert dataclasses.astuple(config.decode) == decode


def test_limits_when_colocated(model: Path) -> None:
    config = parse(model, "--mode colocated --max-num-seqs 4 --max-num-batched-tokens 99")
    assert config.prefill == config.decode == PhaseLimits(4, 99, 0.9)


@pytest.mark.parametrize(
    "text",
    [
        "--decode-max-num-seqs 64 --decode-max-num-batched-tokens 32",
        "--mode colocated --max-num-seqs 64 --max-num-batched-tokens 32",
    ],
)
def test_every_running_sequence_has_a_token(model: Path, text: str) -> None:
    assert "max-num-seqs 64 exceeds" in refusal(model, text)


def test_prompts_fit_the_budget_without_chunks(model: Path) -> None:
    plain = "--no-enable-chunked-prefill"
    assert parse(model, plain).max_model_len is None
    lowered = parse(model, f"{plain} --prefill-max-num-batched-tokens 100")
    assert lowered.max_model_len == 100
    assert any("max_model_len is max_num_batched_tokens, 100" in note for note in lowered.notes)
    text = f"{plain} --max-num-batched-tokens 100 --max-model-len 101"
    assert "without chunked prefill a prompt must fit" in refusal(model, text)


def test_budget_grows_with_the_context_without_chunks(model: Path) -> None:
    config = json.loads((model / "config.json").read_text())
    config["max_position_embeddings"] = 20_000
    (model / "config.json").write_text(json.dumps(config))
    assert parse(model, "--no-enable-chunked-prefill").prefill.max_num_batched_tokens == 20_000
    colocated = parse(model, "--no-enable-chunked-prefill --mode colocated --max-model-len 9000")
    assert colocated.prefill.max_num_batched_tokens == 9000
