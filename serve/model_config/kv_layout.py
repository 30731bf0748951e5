"""What one block of a rank's KV cache looks like, as plain numbers."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class KVLayout:
    """One block: ``[num_layers, num_planes, block_size, len(kv_heads), head_dim]``, contiguous.

    ``kv_heads`` holds the model's ids of the heads this rank keeps, in the rank's own order. A head
    may be kept by several ranks, and by one rank more than once (see ``shard_kv_heads``). The
    planes of a layer are its keys and its values; a latent that both are computed from would be one
    plane of one head. Memory accounting and transfers know no more than this.
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
        """Bytes of one block on this rank."""
        return math.prod(self.block_shape) * self.element_bytes

    def num_blocks_for(self, num_tokens: int) -> int:
        """Blocks that hold ``num_tokens`` tokens."""
        return num_blocks_for(num_tokens, self.block_size)


def num_blocks_for(num_tokens: int, block_size: int) -> int:
    """Return how many blocks hold ``num_tokens`` tokens; the last one may be partly filled."""
    return -(-num_tokens // block_size)


def shard_kv_heads(num_heads: int, num_kv_heads: int, tp: int, tp_rank: int) -> tuple[int, ...]:
    """The KV heads that the query heads of ``tp_rank`` read, in local order.

    Query heads are split evenly. Where the KV heads divide over the ranks, or the ranks over the KV
    heads, every rank keeps each head that it reads once. Otherwise the groups straddle ranks, and a
    rank keeps one KV head per query head, so that attention sees one group size.
    """
    if num_heads % tp:
        raise ValueError(f"tp {tp} does not divide {num_heads} query heads")
    group = num_heads // num_kv_heads
    per_rank = num_heads // tp
    query_heads = range(tp_rank * per_rank, (tp_rank + 1) * per_rank)
    if num_kv_heads % tp == 0 or tp % num_kv_heads == 0:
        return tuple(dict.fromkeys(head // group for head in query_heads))
    return tuple(head // group for head in query_heads)
