"""Verdict: whether the samples of a soak show a leak."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from bench.soak.monitor import RankSample, Sample, at_rest
from bench.soak.tally import Phase

MIN_SAMPLES = 10  # fewer say nothing of growth
MAX_NEW_FDS = 8  # kept connections and the like
MAX_NEW_THREADS = 48  # pools of threads that fill up to their size and stay
_ACCEPTED, _ENDED = "vllm:request_params_max_tokens_count", "vllm:request_success_total"
_MIB = 2**20


@dataclass(frozen=True, slots=True)
class Growth:
    """The memory of one rank over the run."""

    rank: int
    start_mib: float
    end_mib: float
    peak_mib: float
    # Slope of a line through the last two thirds; None: too few samples.
    mib_per_1000_requests: float | None


def measure_growth(samples: Sequence[Sample], phases: Sequence[Phase]) -> list[Growth]:
    """Fit a line through each rank's resident memory over the requests done.

    Samples within floods are left out if enough others are there, because a flood's bodies are in
    memory while it lasts.
    """
    total = samples[-1].num_done if samples else 0
    late = [sample for sample in samples if sample.num_done >= total / 3]
    calm = [sample for sample in late if not _in_flood(sample.time_s, phases)]
    late = calm if len(calm) >= MIN_SAMPLES else late
    found = []
    for rank, memory in _memory(samples).items():
        points = [(s.num_done, r.rss_bytes) for s in late for r in s.ranks if r.rank == rank]
        slope = None
        if len(points) >= MIN_SAMPLES and points[-1][0] > points[0][0]:
            done, rss = np.array(points, dtype=np.float64).T
            slope = float(np.polyfit(done / 1000, rss / _MIB, 1)[0])
        start, end = memory[0], memory[-1]
        found.append(Growth(rank, start / _MIB, end / _MIB, max(memory) / _MIB, slope))
    return found


def find_leaks(start: Sample, end: Sample) -> list[str]:
    """Compare the idle server after the run with the idle server before it."""
    found = []
    if not at_rest(end.replicas):
        found.append(f"the server is not idle after the run: {end.replicas}")
    free = [{one["id"]: one["num_free_blocks"] for one in s.replicas} for s in (start, end)]
    if free[0] != free[1]:
        found.append(f"free blocks by replica were {free[0]} and are {free[1]}")
    if lost := {one.rank for one in start.ranks} - {one.rank for one in end.ranks}:
        found.append(f"ranks {sorted(lost)} have ended")
    before = {one.rank: one for one in start.ranks}
    for after in end.ranks:
        found += _grown(before[after.rank], after)
    return found


def find_growth(
    growth: Sequence[Growth], max_mib_per_1000: float, max_rise_mib: float
) -> list[str]:
    """Return the ranks whose memory grew with the requests, or rose too far at any time."""
    found = []
    for one in growth:
        if (rise := one.peak_mib - one.start_mib) > max_rise_mib:
            found.append(f"rank {one.rank} used {rise:.0f} MiB more than at first")
        slope = one.mib_per_1000_requests
        if slope is not None and slope > max_mib_per_1000:
            found.append(
                f"rank {one.rank} grows by {slope:.2f} MiB per 1000 requests, "
                f"{max_mib_per_1000:g} may be noise"
            )
    return found


def find_missing(after: Mapping[str, float], before: Mapping[str, float]) -> list[str]:
    """Compare the metrics: every request that was accepted in between must have ended once."""
    if _ACCEPTED not in after:
        return ["GET /metrics does not tell how many requests were accepted"]
    accepted, ended = (after[name] - before.get(name, 0.0) for name in (_ACCEPTED, _ENDED))
    return [] if accepted == ended else [f"{accepted:g} requests were accepted, {ended:g} ended"]


def find_log_errors(log: str) -> list[str]:
    """Return the first line of the server's log that reports an error."""
    bad = [line for line in log.splitlines() if " ERROR " in line or "Traceback" in line]
    return [f"{len(bad)} errors in the server's log, the first: {bad[0]}"] if bad else []


def _grown(before: RankSample, after: RankSample) -> list[str]:
    found = []
    for name, most in (("num_fds", MAX_NEW_FDS), ("num_threads", MAX_NEW_THREADS)):
        old, new = getattr(before, name), getattr(after, name)
        if new > old + most:
            found.append(f"rank {after.rank}: {name} was {old} and is {new}")
    return found


def _memory(samples: Sequence[Sample]) -> dict[int, list[int]]:
    found: dict[int, list[int]] = {}
    for sample in samples:
        for one in sample.ranks:
            found.setdefault(one.rank, []).append(one.rss_bytes)
    return found


def _in_flood(time_s: float, phases: Sequence[Phase]) -> bool:
    return any(phase.start_s <= time_s <= phase.end_s for phase in phases)
