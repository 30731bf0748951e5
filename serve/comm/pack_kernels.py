"""Triton kernels that pack KV blocks into a staging buffer and unpack them."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

_ELEMENTS = 2048  # copied at a time by one program
# The next push is packed while one is sent. At full memory bandwidth packing would stop that send,
# so it gets few programs. Unpacking runs between two decode steps and uses the whole GPU.
_PACK_PROGRAMS = 64


@triton.jit(do_not_specialize=["num_lines", "num_tiles", "num_blocks"])
def _copy_kernel(
    cache_ptr, packed_ptr, block_ptr, head_ptr, num_lines, num_tiles, num_blocks,
    block_stride, cache_heads,
    HEADS: tl.constexpr, DIM: tl.constexpr, DIM_BLOCK: tl.constexpr, LINES: tl.constexpr,
    PACK: tl.constexpr,
):  # fmt: skip
    at = tl.arange(0, DIM_BLOCK)[None, :]
    tile = tl.program_id(0)
    while tile < num_tiles * num_blocks:
        index = (tile // num_tiles).to(tl.int64)
        line = tile % num_tiles * LINES + tl.arange(0, LINES)  # (layer, K or V, token, head)
        valid = (line < num_lines)[:, None] & (at < DIM)
        head = tl.load(head_ptr + line % HEADS).to(tl.int32)
        place = (line // HEADS * cache_heads + head)[:, None] * DIM + at
        in_cache = cache_ptr + tl.load(block_ptr + index) * block_stride + place
        in_packed = packed_ptr + index * num_lines * DIM + line[:, None] * DIM + at
        if PACK:
            tl.store(in_packed, tl.load(in_cache, valid), valid)
        else:
            tl.store(in_cache, tl.load(in_packed, valid), valid)
        tile += tl.num_programs(0)


def pack(cache: Tensor, block_ids: Tensor, heads: Tensor, packed: Tensor) -> None:
    """Copy ``heads`` of ``block_ids`` (int64 both) into ``packed``.

    ``cache``: ``[num_blocks, num_layers, 2, block_size, num_kv_heads, size]``, contiguous;
    ``packed``: ``[len(block_ids), num_layers, 2, block_size, len(heads), size]``.
    """
    _launch(cache, block_ids, heads, packed, pack=True)


def unpack(packed: Tensor, block_ids: Tensor, heads: Tensor, cache: Tensor) -> None:
    """Copy ``packed`` back into ``heads`` of ``block_ids``, with the shapes of ``pack``."""
    _launch(cache, block_ids, heads, packed, pack=False)


def _launch(cache: Tensor, block_ids: Tensor, heads: Tensor, packed: Tensor, *, pack: bool) -> None:
    if not len(block_ids):
        return
    size = cache.shape[5]
    num_lines = packed[0].numel() // size
    width = triton.next_power_of_2(size)
    lines = max(1, _ELEMENTS // width)
    num_tiles, num_blocks = triton.cdiv(num_lines, lines), len(block_ids)
    num_programs = num_tiles * num_blocks
    if pack:
        num_programs = min(num_programs, _PACK_PROGRAMS)
    _copy_kernel[(num_programs,)](
        cache, packed, block_ids, heads, num_lines, num_tiles, num_blocks,
        cache.stride(0), cache.shape[4],
        HEADS=len(heads), DIM=size, DIM_BLOCK=width, LINES=lines, PACK=pack,
    )  # fmt: skip
