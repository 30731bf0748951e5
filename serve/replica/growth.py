"""How many blocks the sequences of a decode replica will need, from the lengths of answers seen.

A sequence takes one more block whenever its answer fills one. If a replica takes as many prompts
as fit, they outgrow the pool together; some are preempted and their prompts computed again. So a
sequence is taken only if the largest future need of all of them fits. That is less than the sum of
what each needs at its end, because those that end early leave their blocks to the others. Both the
sum over time and the estimate from past lengths follow Gong et al., "Past-Future Scheduler for LLM
Serving under SLA Guarantees" (ASPLOS 2025).
"""

from __future__ import annotations

import bisect
import math
from collections import deque
from collections.abc import Iterable
from typing import NamedTuple

MAX_LENGTHS = 1024  # how many of the last answers count
# The answers that end first are the short ones, so the first few say nothing about the others.
MIN_LENGTHS = 32
FIRST_GUESS = 512  # tokens of an answer until then, if it may be that long
_LOWEST_QUANTILE = 0.2  # of the answers that are longer than what is there already
_GOLDEN_RATIO = 0.6180339887498949


class OutputLengths:
    """The lengths of the last answers that ended here, and what they let one expect."""

    def __init__(self, max_lengths: int = MAX_LENGTHS) -> None:
        self._max_lengths = max_lengths
        self._recent: deque[int] = deque()  # oldest first
        self._sorted: list[int] = []

    def observe(self, length: int) -> None:
        """Count an answer that has ended with ``length`` tokens."""
        if len(self._recent) == self._max_lengths:
            oldest = self._recent.popleft()
            del self._sorted[bisect.bisect_left(self._sorted, oldest)]
        self._recent.append(length)
        bisect.insort(self._sorted, length)

    def expect(self, num_tokens: int, max_tokens: int, number: int = 0) -> int:
        """Return the length to expect of an answer that has ``num_tokens``, at most ``max_tokens``.

        It is a quantile of the seen answers that are longer. Each sequence, by its ``number``, has
        a quantile of its own, spread evenly, because a pool that expects all of them to end at
        once takes too few. If no answer was longer, this one is expected to grow by half.
        """
        if len(self._recent) < MIN_LENGTHS:
            return min(max(FIRST_GUESS, num_tokens + num_tokens // 2), max_tokens)
        num_shorter = bisect.bisect_right(self._sorted, num_tokens)
        num_longer = len(self._sorted) - num_shorter
        if num_longer == 0:
            return min(num_tokens + num_tokens // 2, max_tokens)
        spread = number * _GOLDEN_RATIO % 1  # evenly in [0, 1), for any run of numbers
        quantile = 1 - (1 - _LOWEST_QUANTILE) * spread
        index = num_shorter + max(0, math.ceil(num_longer * quantile) - 1)
        return min(self._sorted[index], max_tokens)


class Growth(NamedTuple):
    """What one sequence holds, and how it goes on: one token a step for ``num_steps``.

    ``max_growth`` is the most tokens that it can hold in addition to ``num_tokens``: fewer than
    ``num_steps`` if a window frees its first blocks.
    """

    num_steps: int
    num_tokens: int
    max_growth: int


def peak_blocks(growths: Iterable[Growth], block_size: int) -> float:
    """Return the most blocks that the sequences are expected to hold together at any time.

    Between two ends the need only grows, so it is largest just before one of them. Then the
    sequences that go on as long or longer have grown by that many tokens, and the others have
    ended. A sequence's last block is half full in the mean.
    """
    num_tokens = max_growth = 0
    most = 0.0
    for count, growth in enumerate(sorted(growths, reverse=True), 1):
        num_tokens += growth.num_tokens
        max_growth += growth.max_growth
        grown = num_tokens + min(count * growth.num_steps, max_growth)
        most = max(most, grown / block_size + count / 2)
    return most
