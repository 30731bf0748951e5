"""Lengths: draws the input and output length of each request from a distribution.

``fixed``, ``uniform`` and ``lognormal`` take their means from the user. ``sharegpt``, ``humaneval``
and ``longbench`` imitate data sets without reading them: their means are published, the shape
around the means is an assumption, stated at each constant. Input and output lengths of a request
are drawn independently (for ``longbench``: within its task), which is an assumption as well.
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

USER_MEANS = ("fixed", "uniform", "lognormal")
NAMED = ("sharegpt", "humaneval", "longbench")
WORKLOADS = USER_MEANS + NAMED


@dataclass(frozen=True, slots=True)
class Published:
    """Mean lengths of a data set in tokens, and their assumed coefficient of variation."""

    input_mean: float
    output_mean: float
    spread: float


# The means are those of DistServe's workloads (Zhong et al., OSDI'24, arXiv 2401.09670, figure 7);
# they were not counted again. By its published scripts they are tokens of OPT. Its ShareGPT prompts
# include earlier turns, and prompt and answer together stay below 2048; the lengths drawn here have
# no such limit. Its HumanEval answers are the reference solutions. Assumed: the lognormal shape;
# that chat is broad (standard deviation equal to the mean); that HumanEval's hand-written problems
# are alike.
SHAREGPT = Published(input_mean=755.5, output_mean=200.3, spread=1.0)
HUMANEVAL = Published(input_mean=171.3, output_mean=98.2, spread=0.5)


@dataclass(frozen=True, slots=True)
class Task:
    """One LongBench task: mean length in ``unit``, number of examples, limit on output tokens."""

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

# Assumed, because tokenizers differ. English: between 1.3, a common rule for prose, and 1.62, which
# is NarrativeQA's 29,869 tokens (counted in vLLM's pull request 13350) over its 18,409 words. Words
# of code include their brackets and indentation. Several Chinese characters often are one token.
TOKENS_PER = {"words": 1.4, "code": 2.5, "characters": 0.7}

# Assumed, because only means are published. The means of the tasks differ by more than this.
LONGBENCH_SPREAD = 0.5


def make_lengths(
    workload: str, input_len: int | None, output_len: int | None, spread: float
) -> Lengths:
    """Return the length distribution called ``workload``.

    ``input_len`` and ``output_len`` are means in tokens, exact for ``fixed``. ``spread`` is used by
    ``uniform`` and ``lognormal`` only; see there. Raises ``ValueError`` if the name is unknown, if
    lengths are missing or below 1, if they are given to a named distribution (which has its own),
    or if the spread is out of range.
    """
    if workload in NAMED:
        if input_len is not None or output_len is not None:
            raise ValueError(f"{workload} has its own lengths: leave out those of input and output")
        return _named(workload)
    if workload not in USER_MEANS:
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
    return lambda rng: (input_len, output_len)


def uniform(input_len: int, output_len: int, spread: float) -> Lengths:
    """Draw whole numbers from ``mean * (1 - spread)`` to ``mean * (1 + spread)``, both included."""
    if not 0 <= spread <= 1:
        raise ValueError(f"the spread of uniform lengths must be from 0 to 1, not {spread}")
    return _pair(_uniform_length(input_len, spread), _uniform_length(output_len, spread))


def lognormal(input_len: float, output_len: float, spread: float) -> Lengths:
    """Draw from lognormals with these means; ``spread`` is the coefficient of variation."""
    if not (math.isfinite(spread) and spread >= 0):
        raise ValueError(f"the spread of lognormal lengths must be 0 or more, not {spread}")
    return _pair(_lognormal_length(input_len, spread), _lognormal_length(output_len, spread))


def longbench() -> Lengths:
    """Draw a task, weighted by its number of examples, then a length around the task's mean.

    Inputs are lognormal with coefficient of variation ``LONGBENCH_SPREAD``; their mean is the
    published one times ``TOKENS_PER``. Outputs are the task's limit: a server that ignores the end
    of text generates so many tokens in LongBench's own evaluation, and most answers need fewer.
    Lengths are not cut to a model's context here (DistServe cut its LongBench inputs to OPT's,
    about 2000 tokens).
    """
    cumulated = list(accumulate(task.num_examples for task in LONGBENCH))
    inputs = [
        _lognormal_length(task.mean * TOKENS_PER[task.unit], LONGBENCH_SPREAD) for task in LONGBENCH
    ]

    def draw(rng: np.random.Generator) -> tuple[int, int]:
        task = bisect_right(cumulated, int(rng.integers(cumulated[-1])))
        return inputs[task](rng), LONGBENCH[task].max_output

    return draw


def _named(workload: str) -> Lengths:
    if workload == "longbench":
        return longbench()
    published = SHAREGPT if workload == "sharegpt" else HUMANEVAL
    return lognormal(published.input_mean, published.output_mean, published.spread)


def _pair(input_length: Length, output_length: Length) -> Lengths:
    return lambda rng: (input_length(rng), output_length(rng))


def _uniform_length(mean: int, spread: float) -> Length:
    # Half of the range is rounded once, so that the range stays symmetric about the mean. The tiny
    # addition is for products such as 100 * 0.29, which come out just below the whole number.
    half = math.floor(mean * spread + 1e-9)
    return lambda rng: max(1, int(rng.integers(mean - half, mean + half, endpoint=True)))


def _lognormal_length(mean: float, spread: float) -> Length:
    # With s2 = ln(1 + cv^2), exp(N(ln mean - s2 / 2, s2)) has this mean and this cv.
    variance = math.log1p(spread**2)
    mu = math.log(mean) - variance / 2
    sigma = math.sqrt(variance)
    return lambda rng: max(1, round(rng.lognormal(mu, sigma)))
