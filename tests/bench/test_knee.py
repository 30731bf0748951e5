"""The choice of the next rate, and the goodput of measured rates."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bench.sweep.knee import goodput, next_rate

GOAL, STOP = 0.9, 0.5


def measure(
    attainment: Callable[[float], float],
    values: list[float],
    *,
    bisect: int = 3,
    extend: int = 0,
    goal: float = GOAL,
    stop_below: float = STOP,
) -> list[float]:
    """Return the rates in the order in which they are measured."""
    points: dict[float, float] = {}
    while (rate := next_rate(points, values, goal, bisect, stop_below, extend)) is not None:
        assert rate not in points
        assert rate > 0
        points[rate] = attainment(rate)
        assert len(points) <= len(values) + extend + bisect
    return list(points)


def up_to(knee: float) -> Callable[[float], float]:
    """Return an attainment of 1 up to the knee and of 0.7 above."""
    return lambda rate: 1.0 if rate <= knee else 0.7


def test_rising_then_bisection_of_the_gap() -> None:
    assert measure(up_to(5.3), [8, 2, 4, 6]) == [2, 4, 6, 8, 5, 5.5, 5.25]


def test_rising_stops_when_too_little_is_held() -> None:
    assert measure(lambda rate: max(0.0, 1.2 - 0.2 * rate), [1, 2, 4, 8, 16], bisect=0) == [1, 2, 4]


def test_a_lowest_rate_that_fails_is_halved() -> None:
    assert measure(up_to(0.3), [2, 4], bisect=3) == [2, 4, 1, 0.5, 0.25]
    assert measure(lambda rate: 0.0, [2, 4], bisect=2) == [2, 1, 0.5]


def test_rates_beyond_the_highest_only_when_asked_for() -> None:
    assert measure(up_to(99), [4, 8]) == [4, 8]
    assert measure(up_to(99), [4, 8], extend=2) == [4, 8, 10, 12.5]
    assert measure(up_to(9), [4, 8], extend=2, bisect=2) == [4, 8, 10, 9, 9.5]
    # The knee is known already: nothing is gained above.
    assert measure(up_to(5), [4, 8], extend=2, bisect=1) == [4, 8, 6]


def test_a_noisy_miss_is_where_the_knee_is_sought() -> None:
    noisy = {1: 1.0, 2: 0.89, 4: 0.95, 8: 0.2, 1.5: 0.95}
    assert measure(noisy.__getitem__, [1, 2, 4, 8], bisect=1) == [1, 2, 4, 8, 1.5]


def test_rates_have_three_digits_and_a_gap_without_any_is_done() -> None:
    assert measure(up_to(1.005), [1, 1.01], bisect=9) == [1, 1.01]
    assert measure(up_to(1.53), [1, 2], bisect=3) == [1, 2, 1.5, 1.75, 1.62]


@pytest.mark.parametrize(
    ("points", "expected"),
    [
        ({}, None),
        ({1.0: 0.89}, None),
        ({1.0: 0.9}, 1.0),
        ({4.0: 0.2, 1.0: 1.0, 2.0: 0.95}, 2.0),
        ({1.0: 1.0, 2.0: 0.8, 4.0: 0.95}, 1.0),  # above a miss nothing counts
        ({1.0: 0.8, 2.0: 1.0}, None),
    ],
)
def test_goodput(points: dict[float, float], expected: float | None) -> None:
    assert goodput(points, GOAL) == expected


RATES = st.floats(0.01, 1000).map(lambda rate: float(f"{rate:.3g}"))


@given(
    values=st.lists(RATES, min_size=1, max_size=6, unique=True),
    shares=st.dictionaries(RATES, st.floats(0, 1)),
    default=st.randoms(use_true_random=False),
    bisect=st.integers(0, 6),
    extend=st.integers(0, 3),
    goal=st.floats(0.05, 1),
    stop_below=st.floats(0, 1),
)
def test_ends_whatever_is_measured(
    values: list[float],
    shares: dict[float, float],
    default: object,
    bisect: int,
    extend: int,
    goal: float,
    stop_below: float,
) -> None:
    random = default.random  # type: ignore[attr-defined]
    measured = measure(
        lambda rate: shares.get(rate, random()),
        values,
        bisect=bisect,
        extend=extend,
        goal=goal,
        stop_below=stop_below,
    )
    assert len(set(measured)) == len(measured)
    assert min(values) in measured


@given(
    values=st.lists(RATES, min_size=1, max_size=6, unique=True),
    knee=st.floats(0.001, 1500),
    bisect=st.integers(1, 8),
)
def test_the_bracket_shrinks_around_a_knee(values: list[float], knee: float, bisect: int) -> None:
    rates = measure(up_to(knee), values, bisect=bisect)
    rising, halving = rates[: len(values)], rates[len(values) :]
    assert rising == sorted(values)
    assert len(halving) <= bisect
    widths = []
    for count in range(len(rising), len(rates) + 1):
        points = {rate: up_to(knee)(rate) for rate in rates[:count]}
        low = goodput(points, GOAL) or 0.0
        high = min((rate for rate in points if rate > knee), default=None)
        if high is None:
            assert not halving
            assert low == max(values) <= knee
            return
        assert low <= knee < high
        widths.append(high - low)
    assert all(after < before for before, after in pairwise(widths))


@given(
    values=st.lists(RATES, min_size=1, max_size=5, unique=True),
    knee=st.floats(0.001, 1500),
    extend=st.integers(0, 2),
)
def test_goes_on_from_what_is_there(values: list[float], knee: float, extend: int) -> None:
    attainment = up_to(knee)
    rates = measure(attainment, values, extend=extend)
    for count, rate in enumerate(rates):
        points = {one: attainment(one) for one in reversed(rates[:count])}
        assert next_rate(points, values[::-1], GOAL, 3, STOP, extend) == rate
