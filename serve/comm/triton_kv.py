"""Packing KV blocks into a staging buffer and back, as one kernel each, in Triton."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

_ELEMENTS = 2048  # of one program


@triton.jit(do_not_specialize=["num_lines"])
def _copy_kernel(
    cache_ptr, packed_ptr, block_ptr, head_ptr, num_lines, block_stride, cache_heads,
    HEADS: tl.constexpr, DIM: tl.constexpr, DIM_BLOCK: tl.constexpr, LINES: tl.constexpr,
    PACK: tl.constexpr,
):  # fmt: skip
    index = tl.program_id(1).to(tl.int64)
    line = tl.program_id(0) * LINES + tl.arange(0, LINES)  # one head of one token, K or V, layer
    at = tl.arange(0, DIM_BLOCK)[None, :]
    valid = (line < num_lines)[:, None] & (at < DIM)
    head = tl.load(head_ptr + line % HEADS).to(tl.int32)
    place = (line // HEADS * cache_heads + head)[:, None] * DIM + at
    in_cache = cache_ptr + tl.load(block_ptr + index) * block_stride + place
    in_packed = packed_ptr + index * num_lines * DIM + line[:, None] * DIM + at
    if PACK:
        tl.store(in_packed, tl.load(in_cache, valid), valid)
    else:
        tl.store(in_cache, tl.load(in_packed, valid), valid)


def pack(cache: Tensor, block_ids: Tensor, heads: Tensor, packed: Tensor) -> None:
    """Copy ``heads`` of ``block_ids`` (int64 both) into ``packed``.

    ``cache``: ``[num_blocks, num_layers, 2, block_size, num_kv_heads, size]``, contiguous;
    ``packed``: ``[len(block_ids), num_layers, 2, block_size, len(heads), size]``.
    """
    _launch(cache, block_ids, heads, packed, pack=True)


def unpack(packed: Tensor, block_ids: Tensor, heads: Tensor, cache: Tensor) -> None:
    """The way back of ``pack``."""
    _launch(cache, block_ids, heads, packed, pack=False)


def _launch(cache: Tensor, block_ids: Tensor, heads: Tensor, packed: Tensor, *, pack: bool) -> None:
    if not len(block_ids):
        return
    size = cache.shape[5]
    num_lines = packed[0].numel() // size
    width = triton.next_power_of_2(size)
    lines = max(1, _ELEMENTS // width)
    _copy_kernel[(triton.cdiv(num_lines, lines), len(block_ids))](
        cache, packed, block_ids, heads, num_lines, cache.stride(0), cache.shape[4],
        HEADS=len(heads), DIM=size, DIM_BLOCK=width, LINES=lines, PACK=pack,
    )  # fmt: skip
