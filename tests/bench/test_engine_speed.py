"""The micro-benchmarks of the engine: each completes on CPUs and counts correctly."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from bench.micro import sampling_cost as sampling
from bench.micro.decode_beside_push import Times, summarise
from bench.micro.decode_gaps import EDGE, Span, measure_idle, read_spans
from tests.support.checkpoints import write_llama_checkpoint
from tests.support.paths import ROOT

TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
PHASES = ("undisturbed", "paced", "saturated", "on_wire")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write a model's configuration; the benchmarks make random weights themselves."""
    path = write_llama_checkpoint(
        tmp_path_factory.mktemp("model"), seed=7, max_position_embeddings=1024
    )
    (path / "model.safetensors").unlink()
    return path


def measure(*command: str) -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, *command],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    (line,) = done.stdout.splitlines()
    found: dict[str, Any] = json.loads(line)
    return found


def test_decode_gaps(model: Path) -> None:
    options = ("--sequences", "3", "--context", "20", "--steps", "10")
    found = measure("-m", "bench.micro.decode_gaps", str(model), *options)
    assert (found["sequences"], found["context"]) == (3, 20)
    assert found["steps"] >= 10
    assert found["step_ms"] > 0
    names = ("idle_share", "profiled_step_ms", "gap_p50_us", "gap_p99_us", "gap_max_us")
    assert [found[name] for name in names] == [None] * len(names), "there is no GPU to trace"


def test_decode_beside_push(model: Path) -> None:
    options = ("--sequences", "3", "--context", "40", "--steps", "12", "--push-bytes", "65536")
    found = measure(*TORCHRUN, "-m", "bench.micro.decode_beside_push", str(model), *options)
    assert (found["sequences"], found["context"], found["steps"]) == (3, 40, 12)
    assert found["push_bytes"] == 65536
    for name in PHASES:
        assert 0 < found[f"{name}_step_p50_ms"] <= found[f"{name}_step_p99_ms"]
        assert 0 < found[f"{name}_itl_p50_ms"] <= found[f"{name}_itl_p99_ms"]
    for name in PHASES[1:]:
        assert found[f"{name}_pushes"] > 0
        assert found[f"{name}_gb_s"] > 0
        for q in ("p50", "p99"):
            over = found[f"{name}_itl_{q}_ms"] / found[f"undisturbed_itl_{q}_ms"]
            assert found[f"{name}_over_undisturbed_{q}"] == pytest.approx(over)


def test_sampling(capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--rows", "1", "3", "--vocab-size", "500", "--prompt-tokens", "40"]
    sampling.main([*options, "--output-tokens", "7"])
    found = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [one["rows"] for one in found] == [1] * len(sampling.KINDS) + [3] * len(sampling.KINDS)
    assert [one["sampling"] for one in found] == [*sampling.KINDS] * 2
    assert all(0 < one["host_ms"] <= one["ms"] and one["copy_of_logits_ms"] > 0 for one in found)


def test_prefill_beside_streams(model: Path) -> None:
    options = ("--prompt-tokens", "64", "--tokens-per-s", "400", "--streams", "4")
    found = measure(
        "-m", "bench.micro.prefill_beside_streams", str(model), *options, "--requests", "3"
    )  # fmt: skip
    assert (found["prompt_tokens"], found["streams"], found["requests"]) == (64, 4, 3)
    assert found["asked_tokens_s"] == 400
    assert found["fed_tokens"] > 0
    assert found["streamed_tokens"] == found["fed_tokens"], "every token comes once"
    assert found["streamed_tokens_s"] >= 0
    assert found["lag_p99_ms"] >= 0
    ratio = found["loaded_prefill_ms"] / found["idle_prefill_ms"]
    assert found["over_idle"] == pytest.approx(ratio)


# --- what a trace tells -------------------------------------------------------------------------

STEP_NS = 100_000


def trace(num_steps: int) -> list[Span]:
    """Make steps of 100 us: input 2, gap 3, kernels 40 and 50 with a gap of 1, gap 2, tokens 2."""
    spans: list[Span] = []
    for step in range(num_steps):
        begin_ns = 7_000_000 + step * STEP_NS
        for name, start_us, end_us in (
            ("Memcpy HtoD (Pinned -> Device)", 0, 2),
            ("gemm", 5, 45),
            ("attention", 46, 96),
            ("beside it", 50, 60),
            ("Memcpy DtoH (Device -> Pinned)", 96, 98),
        ):
            spans.append(Span(name, begin_ns + start_us * 1000, begin_ns + end_us * 1000))
    return spans


def test_idle_time_of_a_known_trace() -> None:
    idle = measure_idle(trace(EDGE + 11), 10)
    assert idle.profiled_step_ms == pytest.approx(0.1)
    assert idle.busy_ms == pytest.approx(0.094)
    assert idle.idle_share == pytest.approx(0.06)
    assert idle.between_steps_share == pytest.approx(0.05), "1 us lies within the step"
    assert (idle.gap_p50_us, idle.gap_max_us) == (2.5, 3.0), "a gap of 1 us is none"
    assert idle.gaps_per_step == 2


def test_a_hold_up_before_the_window_does_not_count() -> None:
    spans = trace(EDGE + 11)
    late = [Span(s.name, s.start_ns + 10**9, s.end_ns + 10**9) for s in spans[2 * 5 :]]
    assert measure_idle([*spans[: 2 * 5], *late], 10) == measure_idle(spans, 10)


def test_one_long_gap_is_the_longest() -> None:
    spans = trace(EDGE + 11)
    at = (EDGE + 4) * 5
    late = [Span(s.name, s.start_ns + 50_000, s.end_ns + 50_000) for s in spans[at:]]
    idle = measure_idle([*spans[:at], *late], 10)
    assert idle.gap_max_us == 52.0
    assert idle.idle_share == pytest.approx(110 / 1050)
    assert idle.between_steps_share == pytest.approx(100 / 1050)


def test_a_trace_that_is_too_short_is_refused() -> None:
    with pytest.raises(ValueError, match="18 steps of 19"):
        measure_idle(trace(EDGE + 10), 10)


def test_a_trace_without_a_gpu_has_no_spans() -> None:
    tracer = profile(activities=[ProfilerActivity.CPU])
    tracer.start()
    torch.ones(3).sum()
    tracer.stop()
    assert read_spans(tracer) == []


def test_phases_are_compared_by_their_intervals() -> None:
    calm = Times([9.0] * 100, [10.0] * 100, 0, 0.0)
    paced = Times([9.0] * 100, [10.0] * 98 + [15.0] * 2, 7, 12.5)
    found = summarise({"undisturbed": calm, "paced": paced})
    assert found["paced_over_undisturbed_p50"] == 1.0
    assert found["paced_over_undisturbed_p99"] == pytest.approx(1.5)
    assert (found["paced_pushes"], found["paced_gb_s"]) == (7, 12.5)
