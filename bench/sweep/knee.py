"""Knee: chooses the next rate to measure, to find the highest rate that reaches a goal.

1. The listed rates in rising order, until joint attainment falls below ``stop_below``.
2. If all of them reach the goal, up to ``extend`` further rates, each ``GROWTH`` times the one
   before, until one misses the goal.
3. ``bisect`` times the middle between the highest rate that reaches the goal and the lowest that
   misses it. If the lowest rate misses it, bisection starts from 0.

The choice depends only on the measured points, so a sweep that is started again continues as if it
had never stopped.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

GROWTH = 1.25


def next_rate(
    points: Mapping[float, float],
    values: Sequence[float],
    goal: float,
    bisect: int,
    stop_below: float,
    extend: int = 0,
) -> float | None:
    """Return the next rate [req/s] to measure; None when all steps are done.

    ``points``: joint SLO attainment by rate. ``values``: the listed rates, in any order.
    """
    ladder = sorted(values)
    ladder += [_rounded(ladder[-1] * GROWTH**step) for step in range(1, extend + 1)]
    for index, rate in enumerate(ladder):
        if index >= len(values) and any(points[lower] < goal for lower in ladder[:index]):
            break
        if rate not in points:
            return rate
        if points[rate] < stop_below:
            break
    return _middle(points, ladder, goal, bisect)


def goodput(points: Mapping[float, float], goal: float) -> float | None:
    """Return the highest rate [req/s] up to which every measured rate reaches ``goal``.

    Return None if the lowest rate misses it. Attainment need not fall evenly, because arrivals are
    random. Rates above the first miss do not count, because a server that is run at up to its
    goodput would also see the rate of that miss. Nothing is interpolated.
    """
    reached = None
    for rate in sorted(points):
        if points[rate] < goal:
            break
        reached = rate
    return reached


def _middle(
    points: Mapping[float, float], ladder: Sequence[float], goal: float, bisect: int
) -> float | None:
    missed = [rate for rate, attainment in points.items() if attainment < goal]
    if not missed:
        return None
    high = min(missed)
    low = goodput(points, goal) or 0.0
    # All points strictly between these two rates of the ladder come from bisection.
    floor = max((rate for rate in ladder if rate <= low), default=0.0)
    ceiling = min((rate for rate in ladder if rate >= high), default=high)
    num_bisections = sum(floor < rate < ceiling for rate in points)
    middle = _rounded((low + high) / 2)
    if num_bisections >= bisect or not low < middle < high:
        return None
    return middle


def _rounded(rate: float) -> float:
    """Round to three significant digits, because run files are named after the rate."""
    return float(f"{rate:.3g}")
