"""KVLayout: shape and size of one block of a rank's KV cache, as plain numbers. No torch."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class KVLayout:
    """One block: ``[num_layers, num_planes, block_size, len(kv_heads), head_dim]``, contiguous.

    ``kv_heads`` are the model-wide indices of the heads this rank stores, in the rank's order.
    Several ranks may store the same head, and one rank may store it more than once (see
    ``shard_kv_heads``). A layer has two planes, keys and values; a shared latent (as in MLA) would
    be one plane with one head. Memory accounting and KV transfers use nothing but this layout.
    """

    num_layers: int
    block_size: int
    kv_heads: tuple[int, ...]
    head_dim: int
    element_bytes: int
    num_planes: int = 2

    @property
    def block_shape(self) -> tuple[int, int, int, int, int]:
        """``(num_layers, num_planes, block_size, num_kv_heads, head_dim)``."""
        planes = self.num_layers, self.num_planes
        return (*planes, self.block_size, len(self.kv_heads), self.head_dim)

    @property
    def block_bytes(self) -> int:
        """Size of one block on this rank."""
        return math.prod(self.block_shape) * self.element_bytes

    def num_blocks_for(self, num_tokens: int) -> int:
        return num_blocks_for(num_tokens, self.block_size)


def num_blocks_for(num_tokens: int, block_size: int) -> int:
    """Return how many blocks hold ``num_tokens`` tokens; the last one may be partly filled."""
    return -(-num_tokens // block_size)


def shard_kv_heads(num_heads: int, num_kv_heads: int, tp: int, tp_rank: int) -> tuple[int, ...]:
    """Return the KV heads that rank ``tp_rank`` stores, in local order.

    Query heads are split evenly over ``tp`` ranks. If one of ``tp`` and ``num_kv_heads`` divides
    the other, a rank stores each KV head that its query heads read once. Otherwise a group of query
    heads may straddle two ranks. Then a rank stores one KV head per query head, because attention
    needs a uniform group size. Raises ``ValueError`` if ``tp`` does not divide ``num_heads``.
    """
    if num_heads % tp:
        raise ValueError(f"tp {tp} does not divide {num_heads} query heads")
    group = num_heads // num_kv_heads
    per_rank = num_heads // tp
    query_heads = range(tp_rank * per_rank, (tp_rank + 1) * per_rank)
    if num_kv_heads % tp == 0 or tp % num_kv_heads == 0:
        return tuple(dict.fromkeys(head // group for head in query_heads))
    return tuple(head // group for head in query_heads)
