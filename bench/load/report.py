"""Report: computes latencies, throughput, SLO attainment and goodput from a run's records."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from bench.load.record import Record

NUM_QUANTILES = 201
GOALS = (0.9, 0.99)

# The five stages of a request (DistServe, OSDI'24, section 6.3) with their start and end in the
# server's timeline. Each starts where the one before ends, so they add up to the whole time there.
STAGES = (
    ("prefill_queue_s", "arrived_s", "prefill_started_s"),
    ("prefill_s", "prefill_started_s", "prefill_ended_s"),
    ("transfer_s", "prefill_ended_s", "decode_queued_s"),
    ("decode_queue_s", "decode_queued_s", "decode_started_s"),
    ("decode_s", "decode_started_s", "finished_s"),
)


@dataclass(frozen=True, slots=True)
class Objectives:
    """Latency objectives in seconds. None: no objective."""

    ttft_s: float | None = None
    tpot_s: float | None = None

    @property
    def any(self) -> bool:
        return self.ttft_s is not None or self.tpot_s is not None

    def meets_ttft(self, record: Record) -> bool:
        """Return whether a request is within the TTFT objective. A failed request is not."""
        if record.error is not None or record.ttft_s is None:
            return False
        return self.ttft_s is None or record.ttft_s <= self.ttft_s

    def meets_tpot(self, record: Record) -> bool:
        """Return whether a request is within the TPOT objective. A failed request is not.

        An answer of one token is within it, because it has no TPOT.
        """
        if record.error is not None or record.ttft_s is None:
            return False
        return self.tpot_s is None or record.tpot_s is None or record.tpot_s <= self.tpot_s


def distribution(values: Iterable[float]) -> dict[str, float] | None:
    """Return mean and percentiles (interpolated linearly between ranks); None without values."""
    array = np.fromiter(values, dtype=np.float64)
    if array.size == 0:
        return None
    p50, p90, p95, p99 = np.percentile(array, [50, 90, 95, 99])
    found = {
        "count": array.size,
        "mean": array.mean(),
        "std": array.std(),
        "min": array.min(),
        "p50": p50,
        "p90": p90,
        "p95": p95,
        "p99": p99,
        "max": array.max(),
    }
    return {
        name: value.item() if hasattr(value, "item") else value for name, value in found.items()
    }


def stages(record: Record) -> dict[str, float]:
    """Return the seconds in each stage that the request passed, from the server's timeline."""
    timeline = record.timeline or {}
    found = {}
    for name, start, end in STAGES:
        first, last = timeline.get(start), timeline.get(end)
        if first is not None and last is not None:
            found[name] = last - first
    return found


def queueing_s(record: Record) -> float | None:
    """Return the time in the prefill and the decode queue; None without a timeline."""
    passed = stages(record)
    waits = [passed[name] for name in ("prefill_queue_s", "decode_queue_s") if name in passed]
    return sum(waits) if waits else None


def attainment(records: Sequence[Record], objectives: Objectives) -> dict[str, float] | None:
    """Return the shares of requests within the objectives. Failed requests count as missed."""
    if not objectives.any or not records:
        return None
    ttft = [objectives.meets_ttft(record) for record in records]
    tpot = [objectives.meets_tpot(record) for record in records]
    joint = [a and b for a, b in zip(ttft, tpot, strict=True)]
    count = len(records)
    return {"joint": sum(joint) / count, "ttft": sum(ttft) / count, "tpot": sum(tpot) / count}


def summarise(records: Sequence[Record], start_s: float, objectives: Objectives) -> dict[str, Any]:
    """Compute the figures of a run that began at ``start_s`` of the monotonic clock."""
    good = [record for record in records if record.error is None]
    duration_s = max((record.end_s for record in records), default=start_s) - start_s
    share = attainment(records, objectives)

    def per_second(amount: float) -> float:
        return amount / duration_s if duration_s > 0 else 0.0

    return {
        "duration_s": duration_s,
        "num_requests": len(records),
        "num_completed": len(good),
        "num_errors": len(records) - len(good),
        "errors": dict(Counter(r.error for r in records if r.error is not None).most_common()),
        "num_short": sum(r.num_output_tokens < r.max_tokens for r in good),
        "tokens_counted": all(record.counted for record in good),
        "offered_rps": _offered_rps(records),
        "request_throughput_rps": per_second(len(good)),
        "input_tokens_per_s": per_second(sum(r.num_prompt_tokens for r in good)),
        "output_tokens_per_s": per_second(sum(r.num_output_tokens for r in good)),
        **_latencies(records, good),
        "attainment": share,
        "goodput_rps": per_second(share["joint"] * len(records)) if share else None,
        "goodput_at": _goodput_at(share, per_second(len(good))),
    }


def _goodput_at(
    share: Mapping[str, float] | None, throughput_rps: float
) -> dict[str, float | None] | None:
    """Return for each goal this run's throughput if it reaches the goal, else None.

    A server's goodput at a goal is the highest of these over all rates; ``bench.sweep`` finds it.
    """
    if share is None:
        return None
    return {str(goal): throughput_rps if share["joint"] >= goal else None for goal in GOALS}


def _offered_rps(records: Sequence[Record]) -> float | None:
    times = [record.scheduled_s for record in records]
    span_s = max(times, default=0.0) - min(times, default=0.0)
    return (len(times) - 1) / span_s if span_s > 0 else None


def _latencies(records: Sequence[Record], good: Sequence[Record]) -> dict[str, Any]:
    itl = np.fromiter((gap for record in good for gap in record.gaps_s()), dtype=np.float64)
    staged = [found for record in good if (found := stages(record))]
    return {
        "lateness_s": distribution(record.lateness_s for record in records),
        "ttft_s": _distribution_of(record.ttft_s for record in good),
        "ttft_from_send_s": _distribution_of(record.ttft_from_send_s for record in good),
        "tpot_s": _distribution_of(record.tpot_s for record in good),
        "itl_s": distribution(itl),
        "e2e_s": _distribution_of(record.e2e_s for record in good),
        "queueing_s": _distribution_of(queueing_s(record) for record in good),
        "stages": {
            name: distribution(found[name] for found in staged if name in found)
            for name, _, _ in STAGES
        }
        if staged
        else None,
        "itl_quantiles": np.quantile(itl, np.linspace(0, 1, NUM_QUANTILES)).tolist()
        if itl.size
        else None,
    }


def _distribution_of(values: Iterable[float | None]) -> dict[str, float] | None:
    return distribution(value for value in values if value is not None)


def request_row(record: Record, start_s: float) -> dict[str, Any]:
    """Return one request as a row of a run file. Times are seconds since ``start_s``."""
    times = record.token_times_s
    return {
        "index": record.index,
        "scheduled_s": record.scheduled_s - start_s,
        "sent_s": record.sent_s - start_s,
        "first_token_s": times[0] - start_s if times else None,
        "last_token_s": times[-1] - start_s if times else None,
        "end_s": record.end_s - start_s,
        "num_prompt_tokens": record.num_prompt_tokens,
        "num_output_tokens": record.num_output_tokens,
        "ttft_s": record.ttft_s,
        "tpot_s": record.tpot_s,
        "e2e_s": record.e2e_s,
        "queueing_s": queueing_s(record),
        "error": record.error,
    }


def run_file(
    head: Mapping[str, Any],
    records: Sequence[Record],
    start_s: float,
    objectives: Objectives,
    samples: Sequence[Mapping[str, Any]],
) -> dict[str, Any]:
    """Return a run as the JSON object that ``--output`` writes."""
    ordered = sorted(records, key=lambda record: record.index)
    return {
        "version": 1,
        **head,
        "objectives": {"ttft_s": objectives.ttft_s, "tpot_s": objectives.tpot_s},
        "summary": summarise(ordered, start_s, objectives),
        "requests": [request_row(record, start_s) for record in ordered],
        "monitor": list(samples),
    }
