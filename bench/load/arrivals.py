"""Arrivals: the send times of requests, from random processes or from a trace, rescaled."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import pairwise

import numpy as np

KINDS = ("poisson", "gamma", "uniform")
_CHUNK = 256  # gaps drawn per call, because numpy's overhead per call exceeds the draw's cost


def gaps(kind: str, rate: float, cv: float, rng: np.random.Generator) -> Iterator[float]:
    """Return an endless iterator of inter-arrival gaps in seconds with mean ``1 / rate``.

    ``poisson``: exponential gaps. ``gamma``: gamma gaps with coefficient of variation ``cv``
    (1 is Poisson, more is burstier, less is more even); shape ``1 / cv**2``, scale
    ``cv**2 / rate``. ``uniform``: every gap is exactly ``1 / rate``. Only ``gamma`` reads ``cv``.
    Raises ``ValueError`` if the kind is unknown, or if ``rate`` or gamma's ``cv`` is not finite and
    above 0.
    """
    if kind not in KINDS:
        raise ValueError(f"unknown arrivals {kind!r}: one of {', '.join(KINDS)}")
    _check_positive("the rate", rate)
    if kind == "gamma":
        _check_positive("the coefficient of variation of gamma arrivals", cv)
    return _endless_gaps(kind, rate, cv, rng)


def _endless_gaps(kind: str, rate: float, cv: float, rng: np.random.Generator) -> Iterator[float]:
    while True:
        if kind == "poisson":
            chunk = rng.exponential(1 / rate, _CHUNK)
        elif kind == "gamma":
            chunk = rng.gamma(1 / cv**2, cv**2 / rate, _CHUNK)
        else:
            chunk = np.full(_CHUNK, 1 / rate)
        yield from chunk.tolist()


def send_times(kind: str, rate: float, cv: float, rng: np.random.Generator) -> Iterator[float]:
    """Return an endless iterator of send times in seconds from the start of the run.

    The first is 0.0. Each later one follows the one before by a gap. Raises as ``gaps`` does.
    """
    each_gap = gaps(kind, rate, cv, rng)
    if kind == "uniform":
        return _every(1 / rate)
    return _running_sum(each_gap)


def _every(gap_s: float) -> Iterator[float]:
    """Yield multiples of ``gap_s``. They stay exact, where a running sum would drift."""
    index = 0
    while True:
        yield index * gap_s
        index += 1


def _running_sum(each_gap: Iterator[float]) -> Iterator[float]:
    """Yield running sums, compensated after Neumaier: the bits that additions lose are added."""
    total = 0.0
    lost = 0.0
    yield total
    for gap_s in each_gap:
        new_total = total + gap_s
        if total >= gap_s:
            lost += (total - new_total) + gap_s
        else:
            lost += (gap_s - new_total) + total
        total = new_total
        yield total + lost


def scaled(times: Sequence[float], rate: float | None, time_scale: float) -> list[float]:
    """Shift a trace's times [s] so that they start at 0, and stretch them.

    Without a ``rate`` they are multiplied by ``time_scale`` (0.5: twice as fast). With a ``rate``
    they are stretched so that ``(n - 1) / (last - first)`` is ``rate`` requests per second, and
    ``time_scale`` must be 1. A single request is sent at 0, whatever the rate.

    ``times`` must be in order. The reader of the trace sorts the requests by time, because times
    sorted here would no longer belong to their requests. Raises ``ValueError`` if there are no
    times, if they go backwards, if a rate is given for times that are all equal, or if a factor is
    not above 0.
    """
    if not times:
        raise ValueError("the trace has no times")
    if not all(math.isfinite(time_s) for time_s in times):
        raise ValueError("the trace has times that are not finite numbers")
    for index, (time_s, later_s) in enumerate(pairwise(times), start=1):
        if later_s < time_s:
            raise ValueError(
                f"the trace's times go backwards: request {index} is at {later_s} s, "
                f"the one before it at {time_s} s"
            )
    factor = _factor(times, rate, time_scale)
    return [(time_s - times[0]) * factor for time_s in times]


def _factor(times: Sequence[float], rate: float | None, time_scale: float) -> float:
    _check_positive("the time scale", time_scale)
    if rate is None:
        return time_scale
    _check_positive("the rate", rate)
    if time_scale != 1:
        raise ValueError("a trace is scaled by a rate or by a time scale, not by both")
    if len(times) == 1:
        return 1.0
    span_s = times[-1] - times[0]
    if span_s == 0:
        raise ValueError(
            f"the trace's {len(times)} requests are all at one instant: no scale gives them a rate"
        )
    return (len(times) - 1) / (rate * span_s)


def _check_positive(name: str, number: float) -> None:
    if not (math.isfinite(number) and number > 0):
        raise ValueError(f"{name} must be a number above 0, not {number}")
