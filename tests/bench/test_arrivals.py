"""Arrivals: gaps have the mean and spread asked for, times do not drift, traces are rescaled."""

from __future__ import annotations

import math
from itertools import islice

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bench.load.arrivals import gaps, scaled, send_times

NUM_DRAWN = 40_000


def drawn_gaps(kind: str, rate: float, cv: float, seed: int) -> np.ndarray:
    return np.array(list(islice(gaps(kind, rate, cv, np.random.default_rng(seed)), NUM_DRAWN)))


@pytest.mark.parametrize(
    ("kind", "cv", "expected_cv"),
    [("poisson", 3.0, 1.0), ("gamma", 0.25, 0.25), ("gamma", 1.0, 1.0), ("gamma", 2.0, 2.0)],
)
@pytest.mark.parametrize("rate", [0.2, 40.0])
def test_random_gaps_have_the_mean_and_the_spread_asked_for(
    kind: str, cv: float, expected_cv: float, rate: float
) -> None:
    drawn = drawn_gaps(kind, rate, cv, seed=1)
    # Five standard errors of the mean; the seed is fixed, so this is not a matter of luck.
    assert drawn.mean() * rate == pytest.approx(1, abs=5 * expected_cv / math.sqrt(NUM_DRAWN))
    assert drawn.std() / drawn.mean() == pytest.approx(expected_cv, rel=0.05)
    assert drawn.min() >= 0


@pytest.mark.parametrize("kind", ["poisson", "gamma"])
def test_poisson_gaps_and_gamma_gaps_of_cv_1_are_exponential(kind: str) -> None:
    drawn = drawn_gaps(kind, 2.0, 1.0, seed=2)
    for quantile in (0.1, 0.5, 0.9, 0.99):
        assert np.quantile(drawn, quantile) == pytest.approx(-math.log(1 - quantile) / 2, rel=0.05)


def test_uniform_gaps_are_all_alike() -> None:
    assert list(islice(gaps("uniform", 8.0, 1.0, np.random.default_rng(0)), 1000)) == [0.125] * 1000


@pytest.mark.parametrize("kind", ["poisson", "gamma", "uniform"])
def test_send_times_start_at_zero_and_are_the_sums_of_the_gaps(kind: str) -> None:
    times = list(islice(send_times(kind, 3.0, 2.0, np.random.default_rng(4)), 2000))
    each = list(islice(gaps(kind, 3.0, 2.0, np.random.default_rng(4)), 1999))
    assert times[0] == 0.0
    assert times == pytest.approx([math.fsum(each[:count]) for count in range(2000)], rel=1e-15)
    assert times == sorted(times)


def test_send_times_are_a_matter_of_the_seed() -> None:
    first, again, other = (
        list(islice(send_times("poisson", 1.0, 1.0, np.random.default_rng(seed)), 50))
        for seed in (5, 5, 6)
    )
    assert first == again != other


@pytest.mark.parametrize(("kind", "cv"), [("poisson", 1.0), ("gamma", 2.0)])
def test_long_runs_do_not_drift(kind: str, cv: float) -> None:
    each = list(islice(gaps(kind, 1000.0, cv, np.random.default_rng(8)), 199_999))
    *_, last = islice(send_times(kind, 1000.0, cv, np.random.default_rng(8)), 200_000)
    plain_sum = 0.0
    for gap_s in each:
        plain_sum += gap_s
    assert last == math.fsum(each)
    assert last != plain_sum  # otherwise the line above would show nothing


def test_evenly_spaced_times_are_exact_multiples() -> None:
    times = list(islice(send_times("uniform", 10.0, 1.0, np.random.default_rng(0)), 100_001))
    assert times[-1] == 10_000.0
    assert times[3] == 3 * 0.1


@pytest.mark.parametrize("rate", [0.0, -1.0, math.inf, math.nan])
@pytest.mark.parametrize("kind", ["poisson", "gamma", "uniform"])
def test_a_rate_must_be_above_zero(kind: str, rate: float) -> None:
    # At the call, not at the first time taken: an iterator's error would come in the run.
    with pytest.raises(ValueError, match="rate"):
        send_times(kind, rate, 1.0, np.random.default_rng(0))


@pytest.mark.parametrize("cv", [0.0, -1.0, math.nan])
def test_gamma_needs_a_spread(cv: float) -> None:
    with pytest.raises(ValueError, match="coefficient of variation"):
        gaps("gamma", 1.0, cv, np.random.default_rng(0))


def test_unknown_arrivals_are_refused() -> None:
    with pytest.raises(ValueError, match=r"'bursty'.*poisson, gamma, uniform"):
        send_times("bursty", 1.0, 1.0, np.random.default_rng(0))


def test_a_trace_keeps_its_own_times_from_zero() -> None:
    assert scaled([10.0, 10.5, 12.0], None, 1.0) == [0.0, 0.5, 2.0]
    assert scaled([10.0, 10.5, 12.0], None, 0.5) == [0.0, 0.25, 1.0]
    assert scaled([10.0], None, 3.0) == [0.0]
    assert scaled([2.0, 2.0], None, 3.0) == [0.0, 0.0]


def test_a_trace_is_stretched_to_a_rate() -> None:
    assert scaled([1.0, 2.0, 5.0], 4.0, 1.0) == [0.0, 0.125, 0.5]
    assert scaled([7.0], 4.0, 1.0) == [0.0]


@given(
    st.lists(st.floats(0, 1e6), min_size=2, max_size=50).filter(lambda t: max(t) - min(t) > 1e-3),
    st.floats(0.01, 1000),
)
def test_a_stretched_trace_has_the_rate_and_keeps_its_shape(
    unordered: list[float], rate: float
) -> None:
    times = sorted(unordered)
    sent = scaled(times, rate, 1.0)
    assert (len(sent) - 1) / (sent[-1] - sent[0]) == pytest.approx(rate)
    span_s = times[-1] - times[0]
    for time_s, sent_s in zip(times, sent, strict=True):
        assert sent_s / sent[-1] == pytest.approx((time_s - times[0]) / span_s)


@pytest.mark.parametrize(
    ("times", "rate", "time_scale", "words"),
    [
        ([], None, 1.0, "no times"),
        ([0.0, 2.0, 1.0], None, 1.0, "backwards: request 2 is at 1.0 s"),
        ([0.0, math.nan], None, 1.0, "not finite"),
        ([3.0, 3.0, 3.0], 2.0, 1.0, "3 requests are all at one instant"),
        ([0.0, 1.0], 0.0, 1.0, "rate must be"),
        ([0.0, 1.0], None, 0.0, "time scale must be"),
        ([0.0, 1.0], 2.0, 0.5, "not by both"),
    ],
)
def test_times_that_make_no_sense_are_refused(
    times: list[float], rate: float | None, time_scale: float, words: str
) -> None:
    with pytest.raises(ValueError, match=words):
        scaled(times, rate, time_scale)
