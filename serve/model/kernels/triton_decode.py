"""Inputs of a decode step and split-KV decoding (as in Flash-Decoding), in Triton."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from serve.model.kernels.triton_launch import LAUNCH, wait_for_previous_kernel


@triton.jit(
    do_not_specialize=["num_rows"], do_not_specialize_on_alignment=["token_ptr", "sampled_ptr"]
)
def _fill_in_kernel(token_ptr, sampled_ptr, out_ptr, num_rows, BLOCK: tl.constexpr):
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    valid = row < num_rows
    token = tl.load(token_ptr + row, valid, 0)
    sampled = tl.load(sampled_ptr + (-1 - token), valid & (token < 0), 0)
    tl.store(out_ptr + row, tl.where(token < 0, sampled, token), valid)


def fill_in(token_ids: Tensor, sampled: Tensor, out: Tensor) -> Tensor:
    """See ``serve.model.forward_batch.fill_in``. Writes to ``out`` (``[num_rows]``, int64)."""
    _fill_in_kernel[(triton.cdiv(len(out), 128),)](token_ids, sampled, out, len(out), BLOCK=128)
    return out


@triton.jit(do_not_specialize=["num_rows"])
def _combine_kernel(
    parts_ptr, lse_ptr, out_ptr, num_rows, num_heads,
    NUM_SPLITS: tl.constexpr, SPLITS_BLOCK: tl.constexpr,
    DIM: tl.constexpr, DIM_BLOCK: tl.constexpr, USE_PDL: tl.constexpr,
):  # fmt: skip
    if USE_PDL:
        wait_for_previous_kernel()
    row, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    split = tl.arange(0, SPLITS_BLOCK)
    total = NUM_SPLITS * num_rows
    lse = tl.load(
        lse_ptr + head * total + split * num_rows + row, split < NUM_SPLITS, float("-inf")
    )
    # A split without positions has weight 0 and its part is not read, as it may hold NaN.
    weight = tl.exp(lse - tl.max(lse, 0))
    weight = tl.where(lse == float("-inf"), 0.0, weight)
    weight = weight / tl.sum(weight, 0)
    offs = tl.arange(0, DIM_BLOCK)[None, :]
    place = ((split[:, None] * num_rows + row) * num_heads + head) * DIM + offs
    used = (split[:, None] < NUM_SPLITS) & (offs < DIM) & (weight[:, None] > 0)
    parts = tl.load(parts_ptr + place, used, 0.0).to(tl.float32)
    out = tl.sum(parts * weight[:, None], 0)
    offs = tl.arange(0, DIM_BLOCK)
    tl.store(out_ptr + (row * num_heads + head) * DIM + offs, out, offs < DIM)


def combine_splits(parts: Tensor, lse: Tensor, num_splits: int) -> Tensor:
    """See ``ops.combine_splits``."""
    total, num_heads, dim = parts.shape
    num_rows = total // num_splits
    out = parts.new_empty((num_rows, num_heads, dim))
    _combine_kernel[(num_rows, num_heads)](
        parts, lse, out, num_rows, num_heads,
        NUM_SPLITS=num_splits, SPLITS_BLOCK=triton.next_power_of_2(num_splits),
        DIM=dim, DIM_BLOCK=triton.next_power_of_2(dim), **LAUNCH,
    )  # fmt: skip
    return out


# For a row without positions flash-attn 4 reads the table entry before the row's first one. The
# value has no effect, but for the first row that entry would be before the table's memory.
_PADDING = 128  # entries before the table, enough to keep it aligned


@triton.jit(
    do_not_specialize=["num_rows", "width"],
    do_not_specialize_on_alignment=["blocks_ptr", "offset_ptr", "length_ptr"],
)
def _slice_tables_kernel(
    blocks_ptr, offset_ptr, length_ptr, table_ptr, slice_length_ptr, num_rows, width, block_size,
    NUM_SPLITS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row, split = tl.program_id(0), tl.program_id(1)
    length = tl.load(length_ptr + row)
    share = tl.cdiv(length, block_size * NUM_SPLITS)  # blocks of a slice
    first = split * share
    rest = tl.minimum(tl.maximum(length - first * block_size, 0), share * block_size)
    out = split * num_rows + row
    if tl.program_id(2) == 0:
        tl.store(slice_length_ptr + out, rest)
    offs = tl.program_id(2) * BLOCK + tl.arange(0, BLOCK)
    valid = offs < tl.cdiv(rest, block_size)
    blocks = tl.load(blocks_ptr + tl.load(offset_ptr + row) + first + offs, valid, 0)
    tl.store(table_ptr + out.to(tl.int64) * width + offs, blocks, valid)


def slice_tables(
    blocks: Tensor, offsets: Tensor, lengths: Tensor, num_splits: int, width: int, block_size: int
) -> tuple[Tensor, Tensor]:
    """Cut each sequence into ``num_splits`` slices of whole blocks and return their block tables.

    ``blocks`` (int32) holds the tables of all sequences one after another. The table of row ``i``
    begins at ``offsets[i]`` and covers ``lengths[i]`` tokens (both ``[num_rows]``, int32); no table
    is longer than ``width`` blocks. Slices of one sequence have equal numbers of blocks, except
    that the last ones may be shorter or empty.

    Returns tables ``[num_splits * num_rows, ceil(width / num_splits)]``, slice after slice, and
    their lengths in tokens ``[num_splits * num_rows]``, both int32. Entries beyond a row's length
    are uninitialised. There is memory before the first row (see ``_PADDING``).
    """
    num_rows = len(lengths)
    columns = triton.cdiv(width, num_splits)
    memory = torch.empty(
        _PADDING + num_splits * num_rows * columns, dtype=torch.int32, device=blocks.device
    )
    tables = memory[_PADDING:].view(num_splits * num_rows, columns)
    slice_lengths = torch.empty(num_splits * num_rows, dtype=torch.int32, device=blocks.device)
    block = min(1024, triton.next_power_of_2(columns))
    _slice_tables_kernel[(num_rows, num_splits, triton.cdiv(columns, block))](
        blocks, offsets, lengths, tables, slice_lengths, num_rows, columns, block_size,
        NUM_SPLITS=num_splits, BLOCK=block,
    )  # fmt: skip
    return tables, slice_lengths
