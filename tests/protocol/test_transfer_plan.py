"""plan_transfer: each head of each receiver comes from exactly one rank that has it."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serve.model_config.kv_layout import KVLayout, shard_kv_heads
from serve.protocol.transfer_plan import plan_transfer


def layouts(num_heads: int, num_kv_heads: int, tp: int) -> list[KVLayout]:
    return [
        KVLayout(2, 16, shard_kv_heads(num_heads, num_kv_heads, tp, rank), 8, 4)
        for rank in range(tp)
    ]


@st.composite
def shapes(draw: st.DrawFn) -> tuple[int, int, int, int]:
    num_kv_heads = draw(st.integers(1, 8))
    num_heads = num_kv_heads * draw(st.integers(1, 4))
    divisors = [tp for tp in range(1, num_heads + 1) if num_heads % tp == 0]
    return num_heads, num_kv_heads, draw(st.sampled_from(divisors)), draw(
        st.sampled_from(divisors)
    )  # fmt: skip


@given(shapes())
def test_every_head_arrives_once_from_a_rank_that_has_it(shape: tuple[int, int, int, int]) -> None:
    num_heads, num_kv_heads, src_tp, dst_tp = shape
    src, dst = layouts(num_heads, num_kv_heads, src_tp), layouts(num_heads, num_kv_heads, dst_tp)
    slices = plan_transfer(src, dst)
    filled: dict[tuple[int, int], int] = {}
    for part in slices:
        for a, b in zip(part.src_heads, part.dst_heads, strict=True):
            assert src[part.src].kv_heads[a] == dst[part.dst].kv_heads[b]
            assert (part.dst, b) not in filled
            filled[part.dst, b] = a
    assert len(filled) == sum(len(layout.kv_heads) for layout in dst)
    pairs = [(part.dst, part.src) for part in slices]
    assert pairs == sorted(set(pairs)), "one slice per pair of ranks, in one order"


@given(shapes())
def test_query_heads_find_their_kv_head(shape: tuple[int, int, int, int]) -> None:
    num_heads, num_kv_heads, tp, _ = shape
    group = num_heads // num_kv_heads
    for rank in range(tp):
        heads = shard_kv_heads(num_heads, num_kv_heads, tp, rank)
        per_rank = num_heads // tp
        assert per_rank % len(heads) == 0
        local_group = per_rank // len(heads)
        for local in range(per_rank):
            assert heads[local // local_group] == (rank * per_rank + local) // group


def test_equal_splits_send_rank_to_rank() -> None:
    src = layouts(8, 4, 2)
    assert [(s.src, s.dst, s.src_heads, s.dst_heads) for s in plan_transfer(src, src)] == [
        (0, 0, (0, 1), (0, 1)),
        (1, 1, (0, 1), (0, 1)),
    ]


def test_layouts_that_differ_otherwise_are_refused() -> None:
    other = KVLayout(3, 16, (0,), 8, 4)
    with pytest.raises(ValueError, match="differ"):
        plan_transfer(layouts(1, 1, 1), [other])
