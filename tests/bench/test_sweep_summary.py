"""Goodput in a sweep's summary: the rate before the first miss, or what was surely answered."""

from __future__ import annotations

import re

import pytest

from bench.load.record import Record
from bench.load.report import Objectives, run_file
from bench.sweep.experiment import read_experiment
from bench.sweep.summary import Measured, Run, render_sweep, summarise_sweep
from tests.support.paths import ROOT

OBJECTIVES = Objectives(ttft_s=30, tpot_s=5)


def made_run(rate: float, answer_s: float, *, ttft_s: float = 1.0) -> Run:
    """Return a run of nine requests at an even ``rate``; the last is answered ``answer_s`` late."""
    records = []
    for index in range(9):
        sent_s, end_s = index / rate, index / rate + answer_s * (index + 1) / 9
        record = Record(index=index, scheduled_s=sent_s, sent_s=sent_s, end_s=end_s, max_tokens=11)
        record.num_output_tokens = 11
        record.token_times_s = [min(sent_s + ttft_s, end_s), end_s]
        record.token_counts = [1, 10]
        records.append(record)
    head = {"workload": {"rate": rate, "num_requests": 9}, "date": "today"}
    return run_file(head, records, 0.0, OBJECTIVES, [])


def goodput_row(*runs: Run, num_gpus: int = 2) -> tuple[object, bool, str, str]:
    """Return the goodput at the first goal as in the JSON and as in the table."""
    experiment = read_experiment(ROOT / "bench" / "experiments" / "smoke.yaml")
    found = summarise_sweep(experiment, [Measured("one", num_gpus, runs)])
    goodput = found["configurations"][0]["goodput"][str(experiment.goals[0])]
    row = re.search(r"^\| one \| 2 \| ([^|]*) \| ([^|]*) \|", render_sweep(found), re.MULTILINE)
    assert row is not None
    return goodput["rps"], goodput["knee_found"], row[1], row[2]


def test_without_a_knee_goodput_is_what_was_answered_if_that_is_less() -> None:
    """Nine requests in 12.5 s are 0.72 per second, though 4 per second were offered."""
    slow = made_run(4, answer_s=10.5)
    assert slow["summary"]["goodput_at"]["0.9"] == pytest.approx(0.72)
    assert slow["summary"]["offered_rps"] == pytest.approx(4)
    assert goodput_row(slow) == (pytest.approx(0.72), False, "≥ 0.72", "≥ 0.36")
    # A lower rate may have been answered faster than a higher one.
    assert goodput_row(made_run(2, answer_s=0.5), slow) == (
        pytest.approx(2), False, "≥ 2", "≥ 1",
    )  # fmt: skip


def test_without_a_knee_goodput_is_at_most_the_rate() -> None:
    fast = made_run(4, answer_s=0.1)
    assert fast["summary"]["request_throughput_rps"] > 4
    assert goodput_row(fast) == (4, False, "≥ 4", "≥ 2")


def test_with_a_knee_goodput_is_the_rate_before_it() -> None:
    good, missed = made_run(2, answer_s=0.5), made_run(4, answer_s=50, ttft_s=40)
    assert goodput_row(good, missed) == (2, True, "2", "1")
    assert goodput_row(missed)[2] == "< 4"
