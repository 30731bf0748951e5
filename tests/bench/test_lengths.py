"""Lengths: distributions have the means and spreads they claim, and LongBench's table adds up."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bench.load.lengths import (
    LONGBENCH,
    LONGBENCH_SPREAD,
    NAMED,
    TOKENS_PER,
    WORKLOADS,
    Lengths,
    make_lengths,
)

NUM_DRAWN = 20_000


def drawn(lengths: Lengths, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return np.array([lengths(rng) for _ in range(NUM_DRAWN)])  # [num_drawn, 2]


def mean_of(column: np.ndarray) -> object:
    """Return a value that equals every mean within five standard errors of the column's."""
    return pytest.approx(column.mean(), abs=5 * column.std() / math.sqrt(NUM_DRAWN))


def test_fixed_lengths_are_exact() -> None:
    assert set(map(tuple, drawn(make_lengths("fixed", 8000, 200, 0.5)).tolist())) == {(8000, 200)}


def test_uniform_lengths_reach_both_ends_and_every_length_between() -> None:
    both = drawn(make_lengths("uniform", 20, 10, 0.15))
    assert set(both[:, 0].tolist()) == {17, 18, 19, 20, 21, 22, 23}
    assert set(both[:, 1].tolist()) == {9, 10, 11}
    counts = np.unique(both[:, 0], return_counts=True)[1]
    assert counts.min() > 0.9 * NUM_DRAWN / 7
    assert counts.max() < 1.1 * NUM_DRAWN / 7


def test_uniform_ends_are_not_lost_to_rounding() -> None:
    # 100 * 0.29 is 28.999999999999996 as a float.
    inputs = drawn(make_lengths("uniform", 100, 1, 0.29))[:, 0]
    assert (inputs.min(), inputs.max()) == (71, 129)


@pytest.mark.parametrize("spread", [0.2, 1.0, 2.0])
def test_lognormal_lengths_have_the_means_and_the_spread_asked_for(spread: float) -> None:
    both = drawn(make_lengths("lognormal", 4000, 300, spread))
    for column, mean in zip(both.T, (4000, 300), strict=True):
        assert mean == mean_of(column)
        assert np.log(column).std() == pytest.approx(math.sqrt(math.log1p(spread**2)), rel=0.05)
        # The median of a lognormal is its mean over sqrt(1 + cv^2).
        assert np.median(column) == pytest.approx(mean / math.sqrt(1 + spread**2), rel=0.05)


@pytest.mark.parametrize("workload", ["uniform", "lognormal"])
def test_without_spread_lengths_are_the_means(workload: str) -> None:
    assert set(map(tuple, drawn(make_lengths(workload, 70, 30, 0.0)).tolist())) == {(70, 30)}


@pytest.mark.parametrize(
    ("workload", "input_mean", "output_mean"),
    [("sharegpt", 755.5, 200.3), ("humaneval", 171.3, 98.2)],
)
def test_named_lengths_have_the_published_means(
    workload: str, input_mean: float, output_mean: float
) -> None:
    both = drawn(make_lengths(workload, None, None, 0.5))
    assert input_mean == mean_of(both[:, 0])
    assert output_mean == mean_of(both[:, 1])
    assert both.std(axis=0).min() > 10


def test_longbench_table_gives_the_totals_published_with_it() -> None:
    # 4,750 examples; 6,711 words on average in English and code, 13,386 characters in Chinese.
    assert len(LONGBENCH) == 21
    assert sum(task.num_examples for task in LONGBENCH) == 4750
    for chinese, published in ((False, 6711), (True, 13386)):
        tasks = [task for task in LONGBENCH if (task.unit == "characters") == chinese]
        total = sum(task.mean * task.num_examples for task in tasks)
        assert round(total / sum(task.num_examples for task in tasks)) == published


def test_longbench_lengths_follow_its_table() -> None:
    both = drawn(make_lengths("longbench", None, None, 0.5))
    total = sum(task.num_examples for task in LONGBENCH)
    expected = sum(
        task.num_examples / total * task.mean * TOKENS_PER[task.unit] for task in LONGBENCH
    )
    assert expected == mean_of(both[:, 0])
    for max_output in {task.max_output for task in LONGBENCH}:
        tasks = [task for task in LONGBENCH if task.max_output == max_output]
        share = sum(task.num_examples for task in tasks) / total
        assert (both[:, 1] == max_output).mean() == pytest.approx(share, abs=0.02)
    assert set(both[:, 1].tolist()) == {32, 64, 128, 512}


def test_longbench_output_belongs_to_the_task_of_the_input() -> None:
    both = drawn(make_lengths("longbench", None, None, 0.5))
    inputs = both[both[:, 1] == 64, 0]
    tasks = [task for task in LONGBENCH if task.max_output == 64]
    weight = sum(task.num_examples for task in tasks)
    mean = sum(task.num_examples * task.mean * TOKENS_PER[task.unit] for task in tasks) / weight
    assert inputs.mean() == pytest.approx(mean, rel=0.05)
    assert inputs.mean() < 0.8 * both[:, 0].mean()  # code completion: shorter than the average
    assert inputs.std() > LONGBENCH_SPREAD * mean


@pytest.mark.parametrize("workload", WORKLOADS)
def test_lengths_are_a_matter_of_the_seed(workload: str) -> None:
    mean = None if workload in NAMED else 100
    lengths = make_lengths(workload, mean, mean, 0.5)
    assert np.array_equal(drawn(lengths, 3), drawn(make_lengths(workload, mean, mean, 0.5), 3))
    assert workload == "fixed" or not np.array_equal(drawn(lengths, 3), drawn(lengths, 4))


@given(
    st.sampled_from(["fixed", "uniform", "lognormal"]),
    st.integers(1, 100_000),
    st.integers(1, 5),
    st.floats(0, 1),
    st.integers(0, 2**32),
)
def test_every_length_is_a_whole_number_above_zero(
    workload: str, input_len: int, output_len: int, spread: float, seed: int
) -> None:
    lengths = make_lengths(workload, input_len, output_len, spread)
    rng = np.random.default_rng(seed)
    for _ in range(50):
        both = lengths(rng)
        assert all(type(length) is int and length >= 1 for length in both)
        if workload == "uniform":
            assert max(1, input_len * (1 - spread)) <= both[0] + 1e-6
            assert both[0] <= input_len * (1 + spread) + 1e-6


@pytest.mark.parametrize(
    ("workload", "input_len", "output_len", "spread", "words"),
    [
        ("fixed", None, 10, 0.5, "need an input length"),
        ("uniform", 10, None, 0.5, "need an input length"),
        ("lognormal", None, None, 0.5, "need an input length"),
        ("fixed", 0, 10, 0.5, "at least 1"),
        ("fixed", 10, 0, 0.5, "at least 1"),
        ("sharegpt", 100, None, 0.5, "own lengths"),
        ("longbench", None, 100, 0.5, "own lengths"),
        ("uniform", 10, 10, 1.5, "spread"),
        ("uniform", 10, 10, -0.1, "spread"),
        ("lognormal", 10, 10, -0.1, "spread"),
        ("lognormal", 10, 10, math.inf, "spread"),
        ("zipf", 10, 10, 0.5, "unknown workload 'zipf': one of fixed, .*longbench"),
    ],
)
def test_lengths_that_make_no_sense_are_refused(
    workload: str, input_len: int | None, output_len: int | None, spread: float, words: str
) -> None:
    with pytest.raises(ValueError, match=words):
        make_lengths(workload, input_len, output_len, spread)
