"""Knee: which rate to measure next, so that the highest one that holds a goal is found.

First the given rates in rising order, until joint attainment falls under ``stop_below``. If all of
them hold the goal, up to ``extend`` more, each ``GROWTH`` times the one before, until one does not.
Then ``bisect`` times the middle of the gap in which the goal is lost; where the lowest rate does
not hold it, that gap begins at 0.

All of it follows from what has been measured alone: a sweep that is started again goes on as if it
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
    """The next rate [req/s] to measure; None when the knee is known as well as asked for.

    ``points``: joint SLO attainment by rate, ``values``: the rates to begin with, in any order.
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
    """The highest measured rate [req/s] that holds ``goal``, with all lower ones holding it, too.

    None if the lowest does not. Attainment need not fall evenly, since arrivals are random: what
    lies above the first rate that misses the goal does not count, for a server that is run at up to
    its goodput would meet that rate. Nothing is interpolated.
    """
    held = None
    for rate in sorted(points):
        if points[rate] < goal:
            break
        held = rate
    return held


def _middle(
    points: Mapping[float, float], ladder: Sequence[float], goal: float, bisect: int
) -> float | None:
    missed = [rate for rate, attainment in points.items() if attainment < goal]
    if not missed:
        return None
    high = min(missed)
    low = goodput(points, goal) or 0.0
    # Between these two steps of the ladder everything that has been measured is a bisection.
    floor = max((rate for rate in ladder if rate <= low), default=0.0)
    ceiling = min((rate for rate in ladder if rate >= high), default=high)
    num_steps = sum(floor < rate < ceiling for rate in points)
    middle = _rounded((low + high) / 2)
    if num_steps >= bisect or not low < middle < high:
        return None
    return middle


def _rounded(rate: float) -> float:
    """With three significant digits: no rate is known better, and files are named after it."""
    return float(f"{rate:.3g}")
