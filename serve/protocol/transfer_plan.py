"""The plan of a KV transfer: which rank sends which heads to which rank.

The two replicas may have different tensor-parallel sizes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from serve.model_config.kv_layout import KVLayout


@dataclass(frozen=True, slots=True)
class Slice:
    """The heads that one rank sends to another, as positions in the layout of each.

    ``src`` and ``dst`` are tp ranks within their replicas. Head ``src_heads[i]`` of the sender
    becomes head ``dst_heads[i]`` of the receiver.
    """

    src: int
    dst: int
    src_heads: tuple[int, ...]
    dst_heads: tuple[int, ...]


def plan_transfer(src: Sequence[KVLayout], dst: Sequence[KVLayout]) -> tuple[Slice, ...]:
    """Return the slices of one push, ordered by ``(dst, src)``. Both replicas compute the same.

    ``src`` and ``dst`` are the layouts of the two replicas by tp rank. Every head of every receiver
    comes from exactly one sender. If several senders hold a head, the receivers are spread over
    them. Raises ``ValueError`` if the layouts differ in more than their heads.
    """
    _check(src, dst)
    return tuple(
        Slice(src_rank, dst_rank, *pairs)
        for dst_rank, layout in enumerate(dst)
        for src_rank, pairs in sorted(_sources(src, layout, dst_rank).items())
    )


def _sources(
    src: Sequence[KVLayout], layout: KVLayout, dst_rank: int
) -> dict[int, tuple[tuple[int, ...], tuple[int, ...]]]:
    """Return, by sender, the positions of the heads at the sender and at ``dst_rank``."""
    found: dict[int, list[tuple[int, int]]] = {}
    for position, head in enumerate(layout.kv_heads):
        holders = [rank for rank, other in enumerate(src) if head in other.kv_heads]
        holder = holders[dst_rank % len(holders)]
        found.setdefault(holder, []).append((src[holder].kv_heads.index(head), position))
    return {
        rank: (tuple(a for a, _ in pairs), tuple(b for _, b in pairs))
        for rank, pairs in found.items()
    }


def _check(src: Sequence[KVLayout], dst: Sequence[KVLayout]) -> None:
    def common(layout: KVLayout) -> tuple[int, ...]:
        shape = layout.block_shape
        return (*shape[:3], shape[4], layout.element_bytes)

    if {common(layout) for layout in src} != {common(layout) for layout in dst}:
        raise ValueError("the two replicas differ in more than how their heads are split")
