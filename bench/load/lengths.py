"""Lengths: how many tokens each request brings and asks for, drawn from a distribution.

``fixed``, ``uniform`` and ``lognormal`` take their means from the user. ``sharegpt``, ``humaneval``
and ``longbench`` imitate data sets that are not read here: their means are published, the shape
around the means is our assumption, said at each constant. Input and output lengths of a request
are drawn independently (for ``longbench``: given its task), also an assumption.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Callable
from dataclasses import dataclass
from itertools import accumulate

import numpy as np

Length = Callable[[np.random.Generator], int]  # one length in tokens, at least 1
Lengths = Callable[[np.random.Generator], tuple[int, int]]  # (input, output)

GIVEN = ("fixed", "uniform", "lognormal")
NAMED = ("sharegpt", "humaneval", "longbench")
WORKLOADS = GIVEN + NAMED


@dataclass(frozen=True, slots=True)
class Published:
    """Mean lengths of a data set in tokens, and the assumed coefficient of variation of both."""

    input_mean: float
    output_mean: float
    spread: float


# Means: those DistServe gives with its workloads (Zhong et al., OSDI'24, arXiv 2401.09670, figure
# 7), taken over without counting again. By its published scripts they are tokens of OPT; ShareGPT
# prompts include earlier turns, and prompt and answer together stay below 2048, where these do not
# stop; HumanEval answers are the reference solutions. Assumed: the lognormal shape; that chat is
# broad (standard deviation equal to the mean) and HumanEval's hand-written problems are alike.
SHAREGPT = Published(input_mean=755.5, output_mean=200.3, spread=1.0)
HUMANEVAL = Published(input_mean=171.3, output_mean=98.2, spread=0.5)


@dataclass(frozen=True, slots=True)
class Task:
    """One LongBench task: mean length in ``unit``, examples, and its limit on output tokens."""

    name: str
    mean: int
    unit: str  # "words" and "code": split at white space; "characters": of Chinese text
    num_examples: int
    max_output: int


# Mean lengths and examples: the table of statistics in LongBench's task.md
# (github.com/THUDM/LongBench; also table 1 of Bai et al., ACL 2024, arXiv 2308.14508).
# Output limits: config/dataset2maxlen.json there, the most tokens its own evaluation generates.
LONGBENCH = (
    Task("narrativeqa", 18409, "words", 200, 128),
    Task("qasper", 3619, "words", 200, 128),
    Task("multifieldqa_en", 4559, "words", 150, 64),
    Task("multifieldqa_zh", 6701, "characters", 200, 64),
    Task("hotpotqa", 9151, "words", 200, 32),
    Task("2wikimqa", 4887, "words", 200, 32),
    Task("musique", 11214, "words", 200, 32),
    Task("dureader", 15768, "characters", 200, 128),
    Task("gov_report", 8734, "words", 200, 512),
    Task("qmsum", 10614, "words", 200, 512),
    Task("multi_news", 2113, "words", 200, 512),
    Task("vcsum", 15380, "characters", 200, 512),
    Task("trec", 5177, "words", 200, 64),
    Task("triviaqa", 8209, "words", 200, 32),
    Task("samsum", 6258, "words", 200, 128),
    Task("lsht", 22337, "characters", 200, 64),
    Task("passage_count", 11141, "words", 200, 32),
    Task("passage_retrieval_en", 9289, "words", 200, 32),
    Task("passage_retrieval_zh", 6745, "characters", 200, 32),
    Task("lcc", 1235, "code", 500, 64),
    Task("repobench-p", 4206, "code", 500, 64),
)

# Assumed, since tokenizers differ. English: between 1.3, a common rule for prose, and 1.62, which
# is NarrativeQA's 29,869 tokens (counted in vLLM's pull request 13350) over its 18,409 words. Words
# of code carry their brackets and indentation; Chinese characters often join into one token.
TOKENS_PER = {"words": 1.4, "code": 2.5, "characters": 0.7}

# Assumed: only means are published. Tasks differ more from each other than this.
LONGBENCH_SPREAD = 0.5


def make_lengths(
    workload: str, input_len: int | None, output_len: int | None, spread: float
) -> Lengths:
    """The length distribution called ``workload``.

    ``input_len`` and ``output_len`` are means in tokens, exact for ``fixed``. ``spread`` is what
    ``uniform`` and ``lognormal`` say it is; the others do not read it. ``ValueError`` if the name
    is unknown, if lengths are missing, below 1 or given to a named distribution, which has its own,
    or if the spread makes no sense.
    """
    if workload in NAMED:
        if input_len is not None or output_len is not None:
            raise ValueError(f"{workload} has its own lengths: leave out those of input and output")
        return _named(workload)
    if workload not in GIVEN:
        raise ValueError(f"unknown workload {workload!r}: one of {', '.join(WORKLOADS)}")
    if input_len is None or output_len is None:
        raise ValueError(f"{workload} lengths need an input length and an output length")
    if input_len < 1 or output_len < 1:
        raise ValueError(f"lengths must be at least 1, not {input_len} in and {output_len} out")
    if workload == "fixed":
        return fixed(input_len, output_len)
    if workload == "uniform":
        return uniform(input_len, output_len, spread)
    return lognormal(input_len, output_len, spread)


def fixed(input_len: int, output_len: int) -> Lengths:
    """Always these lengths."""
    return lambda rng: (input_len, output_len)


def uniform(input_len: int, output_len: int, spread: float) -> Lengths:
    """Any whole number from ``mean * (1 - spread)`` to ``mean * (1 + spread)``, both included."""
    if not 0 <= spread <= 1:
        raise ValueError(f"the spread of uniform lengths must be from 0 to 1, not {spread}")
    return _pair(_uniform_length(input_len, spread), _uniform_length(output_len, spread))


def lognormal(input_len: float, output_len: float, spread: float) -> Lengths:
    """Lognormal around the means; ``spread`` is the coefficient of variation."""
    if not (math.isfinite(spread) and spread >= 0):
        raise ValueError(f"the spread of lognormal lengths must be 0 or more, not {spread}")
    return _pair(_lognormal_length(input_len, spread), _lognormal_length(output_len, spread))


def longbench() -> Lengths:
    """A random task, weighted by its number of examples; then a length around the task's mean.

    Inputs are lognormal with coefficient of variation ``LONGBENCH_SPREAD`` around the published
    mean times ``TOKENS_PER``. Outputs are the task's limit: what a server that ignores the end of
    text generates in LongBench's own evaluation, and more than most answers need. Nothing is cut
    to a model's length here (DistServe cut its LongBench inputs to OPT's, about 2000 tokens).
    """
    up_to = list(accumulate(task.num_examples for task in LONGBENCH))
    inputs = [
        _lognormal_length(task.mean * TOKENS_PER[task.unit], LONGBENCH_SPREAD) for task in LONGBENCH
    ]

    def draw(rng: np.random.Generator) -> tuple[int, int]:
        chosen = bisect_right(up_to, int(rng.integers(up_to[-1])))
        return inputs[chosen](rng), LONGBENCH[chosen].max_output

    return draw


def _named(workload: str) -> Lengths:
    if workload == "longbench":
        return longbench()
    published = SHAREGPT if workload == "sharegpt" else HUMANEVAL
    return lognormal(published.input_mean, published.output_mean, published.spread)


def _pair(input_length: Length, output_length: Length) -> Lengths:
    return lambda rng: (input_length(rng), output_length(rng))


def _uniform_length(mean: int, spread: float) -> Length:
    # Half of the range is rounded once, so that the mean stays the mean; the tiny addition is for
    # products such as 100 * 0.29 that come out just below the whole number they stand for.
    half = math.floor(mean * spread + 1e-9)
    return lambda rng: max(1, int(rng.integers(mean - half, mean + half, endpoint=True)))


def _lognormal_length(mean: float, spread: float) -> Length:
    # With s2 = ln(1 + cv^2) the lognormal of exp(N(ln mean - s2 / 2, s2)) has this mean and cv.
    variance = math.log1p(spread**2)
    centre = math.log(mean) - variance / 2
    sigma = math.sqrt(variance)
    return lambda rng: max(1, round(rng.lognormal(centre, sigma)))
