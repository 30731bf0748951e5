"""The figures of a run, for cases small enough to compute by hand."""

from __future__ import annotations

import random

import pytest

from bench.load.record import Record
from bench.load.report import (
    Objectives,
    attainment,
    distribution,
    queueing_s,
    run_file,
    stages,
    summarise,
)
from bench.load.table import render


def made(
    scheduled_s: float,
    token_times_s: list[float],
    counts: list[int] | None = None,
    sent_s: float | None = None,
    error: str | None = None,
    **more: object,
) -> Record:
    """Make a request that got tokens at these times, one each unless ``counts`` says otherwise."""
    counts = counts or [1] * len(token_times_s)
    return Record(
        index=int(scheduled_s * 1000),
        scheduled_s=scheduled_s,
        sent_s=scheduled_s if sent_s is None else sent_s,
        end_s=token_times_s[-1] if token_times_s else scheduled_s,
        num_prompt_tokens=10,
        max_tokens=sum(counts),
        num_output_tokens=sum(counts),
        token_times_s=token_times_s,
        token_counts=counts,
        error=error,
        **more,  # type: ignore[arg-type]
    )


def test_latencies_of_one_request() -> None:
    record = made(1.0, [1.5, 1.7, 2.5], [1, 1, 3], sent_s=1.1)
    assert record.ttft_s == pytest.approx(0.5)  # from when it should have been sent
    assert record.ttft_from_send_s == pytest.approx(0.4)
    assert record.lateness_s == pytest.approx(0.1)
    assert record.tpot_s == pytest.approx(1.0 / 4)
    assert record.e2e_s == pytest.approx(1.5)
    assert list(record.gaps_s()) == pytest.approx([0.2, 0.8, 0.0, 0.0])


def test_a_single_token_has_no_tpot_and_no_gaps() -> None:
    record = made(0.0, [0.25])
    assert record.tpot_s is None
    assert list(record.gaps_s()) == []


def test_gaps_add_up_to_the_time_between_first_and_last_token() -> None:
    seed = random.randrange(2**32)
    print("seed", seed)
    rng = random.Random(seed)
    for _ in range(50):
        times = sorted(rng.uniform(0, 10) for _ in range(rng.randrange(1, 20)))
        record = made(0.0, times, [rng.randrange(1, 5) for _ in times])
        gaps = list(record.gaps_s())
        assert len(gaps) == record.num_output_tokens - 1
        assert sum(gaps) == pytest.approx(times[-1] - times[0])


def test_percentiles_are_linear_between_ranks() -> None:
    found = distribution([4.0, 1.0, 2.0, 3.0, 5.0])
    assert found is not None
    assert (found["count"], found["mean"], found["min"], found["max"]) == (5, 3.0, 1.0, 5.0)
    assert found["p50"] == 3.0
    assert found["p90"] == pytest.approx(4.6)
    assert found["p95"] == pytest.approx(4.8)
    assert found["p99"] == pytest.approx(4.96)
    assert found["std"] == pytest.approx(2**0.5)
    assert distribution([]) is None


OBJECTIVES = Objectives(ttft_s=1.0, tpot_s=0.1)
FOUR = [
    made(0.0, [0.5, 0.6, 0.7]),  # within both
    made(1.0, [2.5, 2.55]),  # first token late
    made(2.0, [2.5, 3.5]),  # slow
    made(3.0, [], error="503: full"),
]


def test_attainment_counts_failed_requests_as_missed() -> None:
    assert attainment(FOUR, OBJECTIVES) == {"joint": 0.25, "ttft": 0.5, "tpot": 0.5}
    assert attainment(FOUR, Objectives(ttft_s=1.0)) == {"joint": 0.5, "ttft": 0.5, "tpot": 0.75}
    assert attainment(FOUR, Objectives()) is None
    # An answer of one token has no TPOT to miss, and an objective may be met exactly.
    assert attainment([made(0.0, [1.0])], OBJECTIVES) == {"joint": 1.0, "ttft": 1.0, "tpot": 1.0}


def test_throughput_and_goodput() -> None:
    summary = summarise(FOUR, 0.0, OBJECTIVES)
    assert summary["duration_s"] == pytest.approx(3.5)
    assert (summary["num_requests"], summary["num_completed"], summary["num_errors"]) == (4, 3, 1)
    assert summary["errors"] == {"503: full": 1}
    assert summary["offered_rps"] == pytest.approx(1.0)  # three gaps in three seconds
    assert summary["request_throughput_rps"] == pytest.approx(3 / 3.5)
    assert summary["input_tokens_per_s"] == pytest.approx(30 / 3.5)
    assert summary["output_tokens_per_s"] == pytest.approx(7 / 3.5)
    assert summary["goodput_rps"] == pytest.approx(1 / 3.5)
    assert summary["goodput_at"] == {"0.9": None, "0.99": None}
    assert summary["ttft_s"]["p50"] == pytest.approx(0.5)
    assert summary["itl_s"]["count"] == 4


@pytest.mark.parametrize(("num_missed", "held"), [(0, (1, 1)), (5, (1, 0)), (11, (0, 0))])
def test_a_goal_is_held_from_its_share_on(num_missed: int, held: tuple[int, int]) -> None:
    records = [made(i / 100, [i / 100 + (2 if i < num_missed else 0.5)]) for i in range(100)]
    summary = summarise(records, 0.0, OBJECTIVES)
    at = summary["goodput_at"]
    assert (at["0.9"] is not None, at["0.99"] is not None) == tuple(map(bool, held))


TIMELINE: dict[str, float | None] = {
    "arrived_s": 10.0,
    "prefill_started_s": 10.3,
    "prefill_ended_s": 11.0,
    "decode_queued_s": 11.1,
    "decode_started_s": 11.5,
    "finished_s": 14.0,
    "transfer_started_s": None,
}


def test_stages_add_up_to_the_time_in_the_server() -> None:
    record = made(0.0, [1.0, 4.0], timeline=TIMELINE)
    passed = stages(record)
    assert passed == pytest.approx(
        {
            "prefill_queue_s": 0.3,
            "prefill_s": 0.7,
            "transfer_s": 0.1,
            "decode_queue_s": 0.4,
            "decode_s": 2.5,
        }
    )
    assert sum(passed.values()) == pytest.approx(4.0)
    assert queueing_s(record) == pytest.approx(0.7)
    assert queueing_s(made(0.0, [1.0])) is None
    summary = summarise([record, made(1.0, [2.0])], 0.0, OBJECTIVES)
    assert summary["stages"]["transfer_s"]["count"] == 1
    assert summary["queueing_s"]["mean"] == pytest.approx(0.7)


def test_a_run_of_failures_has_a_report() -> None:
    records = [made(0.0, [], error="refused"), made(1.0, [], error="refused")]
    run = run_file({}, records, 0.0, OBJECTIVES, [])
    assert run["summary"]["ttft_s"] is None
    assert run["summary"]["attainment"]["joint"] == 0
    assert "2 failed: refused" in render(run)


def test_rows_are_in_order_and_relative_to_the_start() -> None:
    records = [made(102.0, [103.0]), made(100.0, [100.5, 101.0])]
    run = run_file({"date": "today"}, records, 100.0, OBJECTIVES, [{"time_s": 0.0}])
    assert [row["scheduled_s"] for row in run["requests"]] == [0.0, 2.0]
    assert run["requests"][0]["first_token_s"] == pytest.approx(0.5)
    assert run["requests"][0]["tpot_s"] == pytest.approx(0.5)
    assert run["monitor"] == [{"time_s": 0.0}]


def test_the_table_tells_of_late_sends_short_answers_and_uncounted_tokens() -> None:
    prompt = run_file({}, FOUR[:1], 0.0, OBJECTIVES, [])
    assert "warning" not in render(prompt)
    late = made(0.0, [0.5, 0.6], sent_s=0.2)
    late.max_tokens, late.counted = 9, False
    text = render(run_file({}, [late], 0.0, OBJECTIVES, []))
    assert "200 ms late" in text
    assert "shorter than requested" in text
    assert "between chunks" in text
    assert "within the objectives (TTFT 1000 ms, TPOT 100 ms): 100.0%" in text
