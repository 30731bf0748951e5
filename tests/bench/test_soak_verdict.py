"""The verdict of a soak: planted leaks, growth and errors are found, and the report shows them."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from pathlib import Path

import pytest

from bench.soak.figure import draw
from bench.soak.monitor import Probe, RankSample, Sample
from bench.soak.report import Report, put_table, read_metrics
from bench.soak.tally import Phase, Tally
from bench.soak.verdict import (
    find_growth,
    find_leaks,
    find_log_errors,
    find_missing,
    measure_growth,
)

MIB = 2**20
RANK = RankSample(rank=0, rss_bytes=300 * MIB, uss_bytes=0, num_fds=30, num_threads=16)
REPLICA = {
    "id": 0, "role": "mixed", "num_blocks": 100, "num_free_blocks": 100,
    "num_waiting": 0, "num_running": 0, "num_receiving": 0, "num_sending": 0,
}  # fmt: skip
IDLE = Sample(time_s=0.0, num_done=0, ranks=(RANK,), replicas=(REPLICA,))


def run_of(mib_per_1000: float, flood_mib: float = 0.0) -> tuple[list[Sample], list[Phase]]:
    """Make a run of 20,000 requests in 200 s, with a flood of 5 s at every 20th second."""
    rng = random.Random(9)
    phases = [Phase("flood", start, start + 5.0) for start in range(20, 200, 20)]
    samples = []
    for second in range(201):
        rss = 300 + mib_per_1000 * second / 10 + rng.uniform(-1, 1)
        if any(phase.start_s <= second <= phase.end_s for phase in phases):
            rss += flood_mib
        rank = replace(RANK, rss_bytes=int(rss * MIB))
        samples.append(replace(IDLE, time_s=float(second), num_done=second * 100, ranks=(rank,)))
    return samples, phases


def test_the_growth_of_a_planted_leak_is_measured() -> None:
    (growth,) = measure_growth(*run_of(mib_per_1000=3.0))
    assert growth.mib_per_1000_requests == pytest.approx(3.0, abs=0.1)
    (found,) = find_growth([growth], 2.0, 512.0)
    assert "rank 0 grows" in found


def test_the_memory_of_a_flood_is_a_rise_and_not_growth() -> None:
    (growth,) = measure_growth(*run_of(mib_per_1000=0.0, flood_mib=900.0))
    assert growth.mib_per_1000_requests == pytest.approx(0.0, abs=0.1)
    assert find_growth([growth], 2.0, 1024.0) == []
    (found,) = find_growth([growth], 2.0, 512.0)
    assert "more than at first" in found


def test_few_samples_say_nothing_of_growth() -> None:
    (growth,) = measure_growth(run_of(3.0)[0][:9], [])
    assert growth.mib_per_1000_requests is None
    assert find_growth([growth], 0.0, 512.0) == []


def test_a_server_that_is_as_before_has_no_leak() -> None:
    later = replace(RANK, num_fds=33, num_threads=24, rss_bytes=2 * RANK.rss_bytes)
    assert find_leaks(IDLE, replace(IDLE, ranks=(later,))) == []


@pytest.mark.parametrize(
    ("end", "named"),
    [
        (replace(IDLE, replicas=({**REPLICA, "num_free_blocks": 99},)), "free blocks"),
        (replace(IDLE, replicas=({**REPLICA, "num_sending": 1},)), "not idle"),
        (replace(IDLE, ranks=(replace(RANK, num_fds=60),)), "num_fds was 30 and is 60"),
        (replace(IDLE, ranks=(replace(RANK, num_threads=90),)), "num_threads"),
        (replace(IDLE, ranks=()), "ranks [0] have ended"),
    ],
)
def test_planted_leaks_are_found(end: Sample, named: str) -> None:
    (found,) = find_leaks(IDLE, end)
    assert named in found


def test_a_request_that_never_ended_is_found() -> None:
    text = "\n".join(
        [
            "# TYPE vllm:request_params_max_tokens histogram",
            'vllm:request_params_max_tokens_bucket{le="+Inf"} 12.0',
            "vllm:request_params_max_tokens_count 12.0",
            "vllm:request_params_max_tokens_sum 40.0",
            "# TYPE vllm:request_success counter",
            'vllm:request_success_total{finished_reason="stop"} 4.0',
            'vllm:request_success_total{finished_reason="abort"} 7.0',
            "",
        ]
    )
    metrics = read_metrics(text)
    assert find_missing(metrics, {}) == ["12 requests were accepted, 11 ended"]
    assert find_missing(metrics, metrics) == []
    assert len(find_missing({}, metrics)) == 1


def test_errors_in_the_log_are_found() -> None:
    assert find_log_errors("x INFO rank 0\nx WARNING rank 1\n") == []
    (found,) = find_log_errors("x INFO a\nx ERROR rank 1: bad\nTraceback (most recent\n")
    assert found.startswith("2 errors")
    assert found.endswith("x ERROR rank 1: bad")


def test_figure_and_report(tmp_path: Path) -> None:
    samples, phases = run_of(0.0, 200.0)
    tally = Tally()
    report = Report(
        options={},
        duration_s=200.0,
        kinds=tally.kinds,
        statuses=tally.statuses,
        flood_statuses={},
        phases=phases,
        growth=measure_growth(samples, phases),
        failures=[],
        samples=samples,
        probes=[Probe(float(second), random.Random(second).random()) for second in range(200)],
    )
    draw(report, tmp_path / "soak.png")
    assert 10_000 < (tmp_path / "soak.png").stat().st_size < 150_000
    assert report.outcome() == "passed"
    failed = report.with_failures(["a leak"])
    assert failed.outcome() == "FAILED: a leak"
    failed.write(tmp_path / "soak.json")
    written = json.loads((tmp_path / "soak.json").read_bytes())
    assert written["failures"] == ["a leak"]
    assert len(written["samples"]) == 201


def test_the_table_replaces_the_documents_table() -> None:
    document = "before\n<!-- soak -->\nold\n<!-- end of soak -->\nafter\n"
    found = put_table(document, "new")
    assert found == document.replace("old", "new")
    assert put_table(found, "old") == document
    with pytest.raises(ValueError, match="no lines"):
        put_table("before\n<!-- soak -->\n", "new")
