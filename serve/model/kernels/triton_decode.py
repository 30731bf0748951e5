"""A decode step's inputs, and the splits of its long rows, in Triton."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from serve.model.kernels.triton_launch import LAUNCH, await_kernel_before


@triton.jit(
    do_not_specialize=["num_rows"], do_not_specialize_on_alignment=["token_ptr", "sampled_ptr"]
)
def _take_up_kernel(token_ptr, sampled_ptr, out_ptr, num_rows, BLOCK: tl.constexpr):
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    valid = row < num_rows
    token = tl.load(token_ptr + row, valid, 0)
    sampled = tl.load(sampled_ptr + (-1 - token), valid & (token < 0), 0)
    tl.store(out_ptr + row, tl.where(token < 0, sampled, token), valid)


def take_up(token_ids: Tensor, sampled: Tensor, out: Tensor) -> Tensor:
    """``serve.model.forward_batch.fill_in`` as one kernel, into ``out``: ``[num_rows]``, int64."""
    _take_up_kernel[(triton.cdiv(len(out), 128),)](token_ids, sampled, out, len(out), BLOCK=128)
    return out


@triton.jit(do_not_specialize=["num_rows"])
def _combine_kernel(
    parts_ptr, lse_ptr, out_ptr, num_rows, num_heads,
    NUM_SPLITS: tl.constexpr, SPLITS_BLOCK: tl.constexpr,
    DIM: tl.constexpr, DIM_BLOCK: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    if EARLY:
        await_kernel_before()
    row, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    split = tl.arange(0, SPLITS_BLOCK)
    total = NUM_SPLITS * num_rows
    lse = tl.load(
        lse_ptr + head * total + split * num_rows + row, split < NUM_SPLITS, float("-inf")
    )
    # A split without positions has no weight, whatever stands in its part.
    weight = tl.exp(lse - tl.max(lse, 0))
    weight = tl.where(lse == float("-inf"), 0.0, weight)
    weight = weight / tl.sum(weight, 0)
    at = tl.arange(0, DIM_BLOCK)[None, :]
    place = ((split[:, None] * num_rows + row) * num_heads + head) * DIM + at
    used = (split[:, None] < NUM_SPLITS) & (at < DIM) & (weight[:, None] > 0)
    parts = tl.load(parts_ptr + place, used, 0.0).to(tl.float32)
    out = tl.sum(parts * weight[:, None], 0)
    at = tl.arange(0, DIM_BLOCK)
    tl.store(out_ptr + (row * num_heads + head) * DIM + at, out, at < DIM)


def combine_splits(parts: Tensor, lse: Tensor, num_splits: int) -> Tensor:
    """One attention result of those over disjoint positions.

    ``parts``: ``[num_splits * num_rows, num_heads, head_dim]``, split after split; ``lse``:
    ``[num_heads, num_splits * num_rows]``, float32, -inf where a split has no position.
    """
    total, num_heads, dim = parts.shape
    num_rows = total // num_splits
    out = parts.new_empty((num_rows, num_heads, dim))
    _combine_kernel[(num_rows, num_heads)](
        parts, lse, out, num_rows, num_heads,
        NUM_SPLITS=num_splits, SPLITS_BLOCK=triton.next_power_of_2(num_splits),
        DIM=dim, DIM_BLOCK=triton.next_power_of_2(dim), **LAUNCH,
    )  # fmt: skip
    return out


# Of a row without a position flash-attn 4 asks for the block before its first. Whatever it is told,
# it counts nothing; but without this the first row's would lie before the table's memory.
_BEFORE = 128  # entries: as many as keep the table aligned


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
    at = tl.program_id(2) * BLOCK + tl.arange(0, BLOCK)
    valid = at < tl.cdiv(rest, block_size)
    blocks = tl.load(blocks_ptr + tl.load(offset_ptr + row) + first + at, valid, 0)
    tl.store(table_ptr + out.to(tl.int64) * width + at, blocks, valid)


def slice_tables(
    blocks: Tensor, offsets: Tensor, lengths: Tensor, num_splits: int, width: int, block_size: int
) -> tuple[Tensor, Tensor]:
    """Block tables of ``num_splits`` slices of each sequence, of whole blocks and equal length.

    ``blocks``: int32, the tables of all sequences one after another, that of row ``i`` from
    ``offsets[i]`` on for ``lengths[i]`` tokens (both ``[num_rows]``, int32). Returns tables
    ``[num_splits * num_rows, ceil(width / num_splits)]`` and lengths in tokens, slice after slice.
    Beyond its length a row holds anything; before the first row there is memory, too.
    """
    num_rows = len(lengths)
    columns = triton.cdiv(width, num_splits)
    memory = torch.empty(
        _BEFORE + num_splits * num_rows * columns, dtype=torch.int32, device=blocks.device
    )
    tables = memory[_BEFORE:].view(num_splits * num_rows, columns)
    slice_lengths = torch.empty(num_splits * num_rows, dtype=torch.int32, device=blocks.device)
    block = min(1024, triton.next_power_of_2(columns))
    _slice_tables_kernel[(num_rows, num_splits, triton.cdiv(columns, block))](
        blocks, offsets, lengths, tables, slice_lengths, num_rows, columns, block_size,
        NUM_SPLITS=num_splits, BLOCK=block,
    )  # fmt: skip
    return tables, slice_lengths
