"""Table: prints a run's figures as text."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

LATE_S = 0.010  # a P99 lateness above this gives a warning

_COLUMNS = ("mean", "p50", "p90", "p95", "p99", "max")
_LATENCIES = (
    ("TTFT", "ttft_s"),
    ("TTFT from the actual send", "ttft_from_send_s"),
    ("TPOT", "tpot_s"),
    ("ITL", "itl_s"),
    ("E2E latency", "e2e_s"),
    ("Queueing", "queueing_s"),
    ("Lateness of sends", "lateness_s"),
)
_STAGES = (
    ("- prefill queue", "prefill_queue_s"),
    ("- prefill", "prefill_s"),
    ("- KV transfer", "transfer_s"),
    ("- decode queue", "decode_queue_s"),
    ("- decode", "decode_s"),
)


def render(run: Mapping[str, Any]) -> str:
    summary = run["summary"]
    return "\n".join([*_interruption(run), *_counts(summary), "", *_times(summary), *_verdict(run)])


def _interruption(run: Mapping[str, Any]) -> Iterator[str]:
    if run.get("interrupted"):
        ended, planned = run["summary"]["num_requests"], run["workload"]["num_requests"]
        yield f"INTERRUPTED: only the {ended} of {planned} requests that had ended are reported"


def _counts(summary: Mapping[str, Any]) -> Iterator[str]:
    done, total = summary["num_completed"], summary["num_requests"]
    yield f"{done} of {total} requests answered in {summary['duration_s']:.1f} s"
    offered = summary["offered_rps"]
    offered_text = "" if offered is None else f" (offered: {offered:.2f})"
    yield f"{summary['request_throughput_rps']:.2f} requests/s{offered_text}, " + (
        f"{summary['input_tokens_per_s']:.0f} tokens/s in, "
        f"{summary['output_tokens_per_s']:.0f} tokens/s out"
    )
    for text, count in summary["errors"].items():
        yield f"  {count} failed: {text}"


def _times(summary: Mapping[str, Any]) -> Iterator[str]:
    yield f"{'ms':<26}" + "".join(f"{name:>10}" for name in _COLUMNS)
    stages = summary["stages"] or {}
    rows = [(label, summary[name]) for label, name in _LATENCIES]
    rows += [(label, stages.get(name)) for label, name in _STAGES]
    for label, found in rows:
        if found is not None:
            yield f"{label:<26}" + "".join(f"{found[name] * 1e3:>10.2f}" for name in _COLUMNS)


def _verdict(run: Mapping[str, Any]) -> Iterator[str]:
    summary, objectives = run["summary"], run["objectives"]
    share = summary["attainment"]
    if share is not None:
        limits = ", ".join(
            f"{label} {objectives[name] * 1e3:g} ms"
            for label, name in (("TTFT", "ttft_s"), ("TPOT", "tpot_s"))
            if objectives[name] is not None
        )
        yield ""
        yield f"within the objectives ({limits}): {share['joint']:.1%}" + (
            f" (TTFT alone {share['ttft']:.1%}, TPOT alone {share['tpot']:.1%}), "
            f"goodput {summary['goodput_rps']:.2f} requests/s"
        )
        for goal, rate in summary["goodput_at"].items():
            reached = "not reached" if rate is None else f"reached at {rate:.2f} requests/s"
            yield f"  {float(goal):.0%}: {reached}"
    yield from _warnings(summary)


def _warnings(summary: Mapping[str, Any]) -> Iterator[str]:
    lateness = summary["lateness_s"]
    if lateness is not None and lateness["p99"] > LATE_S:
        yield (
            f"warning: 1 % of the requests were sent {lateness['p99'] * 1e3:.0f} ms late or more: "
            "this machine could not keep up with the rate; raise --processes"
        )
    if summary["num_short"]:
        yield f"warning: {summary['num_short']} answers were shorter than requested"
    if not summary["tokens_counted"]:
        yield (
            "warning: the server reports no running token counts: "
            "ITL is the time between chunks of text"
        )
