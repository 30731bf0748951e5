"""Prompts: random token ids of a given length, the same in every process of a run."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

BLOCK = 512  # tokens per hash id, as in the Mooncake traces

_OWN, _SHARED = 0, 1  # random streams: tokens of one request, tokens of a hash id
_NUM_KEPT_BLOCKS = 4096  # 8 MiB


class PromptMaker:
    """Makes prompts of random token ids from ``low`` to ``high``, both included.

    A prompt depends on ``seed`` and the arguments of the call, not on earlier calls, so all
    processes make the same one. Raises ``ValueError`` if the range is empty or negative, or if the
    seed is negative.
    """

    def __init__(self, seed: int, low: int, high: int) -> None:
        if not 0 <= low <= high:
            raise ValueError(f"there are no token ids from {low} to {high}")
        if seed < 0:
            raise ValueError(f"the seed must not be negative: {seed}")
        self._seed = seed
        self._low = low
        self._high = high
        self._block = lru_cache(_NUM_KEPT_BLOCKS)(self._make_block)

    def tokens(self, index: int, length: int) -> list[int]:
        """Return ``length`` token ids for request ``index``.

        The first token counts up with the index. So ``high - low + 1`` requests in a row have no
        prefix in common, and none of them hits a prefix cache by chance.
        """
        ids: list[int] = self._own(index, length).tolist()
        return ids

    def from_hashes(self, index: int, hash_ids: Sequence[int], length: int) -> list[int]:
        """Return ``length`` token ids: ``BLOCK`` for each hash id, the last block cut to fit.

        Equal hash ids give equal blocks in every request, so two requests share as many blocks of
        prefix as they share leading hash ids. Tokens beyond the hash ids are those of ``tokens``.
        """
        used = hash_ids[: -(-length // BLOCK)]
        blocks = [self._block(hash_id) for hash_id in used]
        num_missing = length - BLOCK * len(used)
        if num_missing > 0 or not blocks:
            blocks.append(self._own(index, num_missing))
        ids: list[int] = np.concatenate(blocks)[:length].tolist()
        return ids

    def _own(self, index: int, length: int) -> NDArray[np.int32]:
        ids = self._draw(_OWN, index, length)
        if length:
            num_ids = self._high - self._low + 1
            ids[0] = self._low + (self._seed + index) % num_ids
        return ids

    def _make_block(self, hash_id: int) -> NDArray[np.int32]:
        return self._draw(_SHARED, hash_id, BLOCK)

    def _draw(self, stream: int, number: int, length: int) -> NDArray[np.int32]:
        rng = np.random.default_rng([self._seed, stream, number])
        return rng.integers(self._low, self._high, length, dtype=np.int32, endpoint=True)
