"""The small kernels between matrix products and attention, in Triton; the formulas of ``ops``.

Arithmetic is float32 inside a kernel, and rounds where the formulas of ``ops`` round: sums of the
residual stream and normed values are of the activations' type before they go on.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_MAX_BLOCK = 8192  # elements one program holds in registers


# On Hopper and newer the kernels of a layer are set up while the kernel before still runs, and wait
# for its results on the device (programmatic dependent launch). What they read before they wait
# must be older than that kernel: weights.
_IS_HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability()[0] >= 9
_LAUNCH = {"EARLY": True, "launch_pdl": True} if _IS_HOPPER else {"EARLY": False}


_MAX_ROW_FEATURES = 8192  # longer rows are read as fast by the library
_ROW_BLOCK = 2048


@triton.jit
def _await_kernel_before():
    """Wait for its results; whatever is launched ahead next may be set up from now on."""
    tl.extra.cuda.gdc_wait()
    tl.extra.cuda.gdc_launch_dependents()


@triton.jit
def _row_linear_kernel(
    x_ptr, weight_ptr, bias_ptr, out_ptr, out_features,
    SIZE: tl.constexpr, HAS_BIAS: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    at = tl.arange(0, BLOCK)
    exists = (row < out_features)[:, None]
    weights = weight_ptr + row.to(tl.int64)[:, None] * SIZE + at[None, :]
    # The weights do not depend on the kernel before.
    weight = tl.load(weights, exists & (at < SIZE)[None, :], 0.0)
    if EARLY:
        _await_kernel_before()
    x = tl.load(x_ptr + at, at < SIZE, 0.0)
    total = weight.to(tl.float32) * x.to(tl.float32)[None, :]
    for start in tl.static_range(BLOCK, SIZE, BLOCK):
        valid = at + start < SIZE
        weight = tl.load(weights + start, exists & valid[None, :], 0.0)
        x = tl.load(x_ptr + start + at, valid, 0.0)
        total += weight.to(tl.float32) * x.to(tl.float32)[None, :]
    out = tl.sum(total, 1)
    if HAS_BIAS:
        out += tl.load(bias_ptr + row, row < out_features, 0.0).to(tl.float32)
    tl.store(out_ptr + row, out.to(out_ptr.dtype.element_ty), row < out_features)


def prefers_row_linear(x: Tensor, weight: Tensor) -> bool:
    """Whether ``row_linear`` is the faster product: one token on a GPU that overlaps launches."""
    return (
        _IS_HOPPER
        and x.shape[0] == 1
        and x.dtype in (torch.bfloat16, torch.float16)
        and 0 < weight.shape[1] <= _MAX_ROW_FEATURES
    )


def row_linear(x: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor | None) -> Tensor:
    """``x`` (``[1, in_features]``) times the transpose of ``weight``, plus ``bias``.

    At one token a product is the reading of its weights, nearly: 4.0 to 4.6 TB/s here where
    cuBLAS comes to 2.7 to 4.3.
    """
    out_features, size = weight.shape
    if out is None:
        out = x.new_empty((1, out_features))
    rows = 2
    _row_linear_kernel[(triton.cdiv(out_features, rows),)](
        x, weight, weight if bias is None else bias, out, out_features,
        SIZE=size, HAS_BIAS=bias is not None, ROWS=rows,
        BLOCK=min(_ROW_BLOCK, triton.next_power_of_2(size)), num_warps=8, **_LAUNCH,
    )  # fmt: skip
    return out


@triton.jit
def _rms_norm_kernel(
    x_ptr, residual_ptr, weight_ptr, out_ptr, x_stride, size, eps,
    ADD: tl.constexpr, BLOCK: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    valid = at < size
    weight = tl.load(weight_ptr + at, valid, 0.0)
    if EARLY:
        _await_kernel_before()
    x = tl.load(x_ptr + row * x_stride + at, valid, 0.0)
    if ADD:
        residual = tl.load(residual_ptr + row * size + at, valid, 0.0)
        x = (x.to(tl.float32) + residual.to(tl.float32)).to(residual.dtype)
        tl.store(residual_ptr + row * size + at, x, valid)
    wide = x.to(tl.float32)
    scale = tl.rsqrt(tl.sum(wide * wide, 0) / size + eps)
    normed = (wide * scale).to(weight.dtype).to(tl.float32)
    out = (normed * weight.to(tl.float32)).to(weight.dtype)
    tl.store(out_ptr + row * size + at, out, valid)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """``x`` (``[num_tokens, size]``) scaled to unit mean square, times ``weight``."""
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    _launch_norm(x, x, weight, out, eps, add=False)
    return out


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> Tensor:
    """The norm of ``residual + x``, which ``residual`` becomes."""
    out = torch.empty_like(residual)
    _launch_norm(x, residual, weight, out, eps, add=True)
    return out


def _launch_norm(
    x: Tensor, residual: Tensor, weight: Tensor, out: Tensor, eps: float, *, add: bool
) -> None:
    num_rows, size = x.shape
    block = triton.next_power_of_2(size)
    num_warps = 4 if block <= 2048 else 8 if block <= _MAX_BLOCK else 16
    if num_rows:
        _rms_norm_kernel[(num_rows,)](
            x, residual, weight, out, x.stride(0), size, eps,
            ADD=add, BLOCK=block, num_warps=num_warps, **_LAUNCH,
        )  # fmt: skip


@triton.jit
def _silu_mul_kernel(x_ptr, out_ptr, size, BLOCK: tl.constexpr, EARLY: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    valid = at < size
    if EARLY:
        _await_kernel_before()
    gate = tl.load(x_ptr + row * 2 * size + at, valid, 0.0)
    up = tl.load(x_ptr + row * 2 * size + size + at, valid, 0.0)
    wide = gate.to(tl.float32)
    activated = (wide / (1.0 + tl.exp(-wide))).to(gate.dtype).to(tl.float32)
    out = (activated * up.to(tl.float32)).to(gate.dtype)
    tl.store(out_ptr + row * size + at, out, valid)


def silu_mul(gate_up: Tensor) -> Tensor:
    """``[num_tokens, 2 * size]``, the gates first, to ``silu(gate) * up``."""
    num_rows, size = gate_up.shape[0], gate_up.shape[1] // 2
    out = gate_up.new_empty((num_rows, size))
    block = min(2048, triton.next_power_of_2(max(size, 1)))
    if num_rows and size:
        grid = (num_rows, triton.cdiv(size, block))
        _silu_mul_kernel[grid](gate_up, out, size, BLOCK=block, **_LAUNCH)
    return out


# Compiled once, whatever the batch: its integers lie anywhere in the buffer that brought them.
@triton.jit(do_not_specialize_on_alignment=["slot_ptr"])
def _rope_write_kernel(
    qkv_ptr, cos_ptr, sin_ptr, q_ptr, k_ptr, v_ptr, slot_ptr,
    qkv_stride, block_stride, token_stride, block_size,
    NUM_Q: tl.constexpr, NUM_KV: tl.constexpr, DIM: tl.constexpr,
    HALF_BLOCK: tl.constexpr, HEADS: tl.constexpr, COPIES: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)[:, None]  # of queries, keys, values
    half: tl.constexpr = DIM // 2
    at = tl.arange(0, HALF_BLOCK)[None, :]
    valid = (head < NUM_Q + 2 * NUM_KV) & (at < half)
    if EARLY:
        _await_kernel_before()
    source = qkv_ptr + token * qkv_stride + head * DIM + at
    first = tl.load(source, valid, 0.0)
    second = tl.load(source + half, valid, 0.0)
    cos = tl.load(cos_ptr + token * half + at, at < half, 1.0)
    sin = tl.load(sin_ptr + token * half + at, at < half, 0.0)
    turned = head < NUM_Q + NUM_KV
    wide_first, wide_second = first.to(tl.float32), second.to(tl.float32)
    out_first = tl.where(turned, wide_first * cos - wide_second * sin, wide_first).to(first.dtype)
    out_second = tl.where(turned, wide_second * cos + wide_first * sin, wide_second)
    out_second = out_second.to(first.dtype)
    for copy in tl.static_range(COPIES):
        row = copy * tl.num_programs(0) + token
        query = q_ptr + (row * NUM_Q + head) * DIM + at
        tl.store(query, out_first, valid & (head < NUM_Q))
        tl.store(query + half, out_second, valid & (head < NUM_Q))
    # Rows that fill up a batch have nowhere to go.
    slot = tl.load(slot_ptr + token)
    valid &= slot >= 0
    place = (slot // block_size) * block_stride + (slot % block_size) * token_stride
    is_key = (head >= NUM_Q) & (head < NUM_Q + NUM_KV)
    key = k_ptr + place + (head - NUM_Q) * DIM + at
    tl.store(key, out_first, valid & is_key)
    tl.store(key + half, out_second, valid & is_key)
    is_value = head >= NUM_Q + NUM_KV
    value = v_ptr + place + (head - NUM_Q - NUM_KV) * DIM + at
    tl.store(value, out_first, valid & is_value)
    tl.store(value + half, out_second, valid & is_value)


def rope_write(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    slot_mapping: Tensor,
    num_copies: int,
) -> Tensor:
    """Turn queries and keys; keys and values go to their slots, the queries are returned.

    ``qkv``: ``[num_tokens, (num_heads + 2 * num_kv_heads) * head_dim]``; ``cos`` and ``sin``:
    ``[num_tokens, head_dim / 2]``, float32; the caches ``[num_blocks, block_size, num_kv_heads,
    head_dim]``, strided; ``slot_mapping``: ``[num_tokens]``, int64, -1 for a token that is not
    kept. Returns ``[num_copies * num_tokens, num_heads, head_dim]``, copy after copy.
    """
    block_size, num_kv_heads, dim = k_cache.shape[1:]
    num_heads = qkv.shape[1] // dim - 2 * num_kv_heads
    q = qkv.new_empty((num_copies * len(qkv), num_heads, dim))
    heads = 8
    grid = (len(qkv), triton.cdiv(num_heads + 2 * num_kv_heads, heads))
    if len(qkv):
        _rope_write_kernel[grid](
            qkv, cos, sin, q, k_cache, v_cache, slot_mapping,
            qkv.stride(0), k_cache.stride(0), k_cache.stride(1), block_size,
            NUM_Q=num_heads, NUM_KV=num_kv_heads, DIM=dim,
            HALF_BLOCK=triton.next_power_of_2(dim // 2), HEADS=heads, COPIES=num_copies, **_LAUNCH,
        )  # fmt: skip
    return q


@triton.jit(
    do_not_specialize=["num_rows"], do_not_specialize_on_alignment=["token_ptr", "sampled_ptr"]
)
def _take_up_kernel(token_ptr, sampled_ptr, out_ptr, num_rows, BLOCK: tl.constexpr):
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    valid = row < num_rows
    token = tl.load(token_ptr + row, valid, 0)
    sampled = tl.load(sampled_ptr + (-1 - token), valid & (token < 0), 0)
    tl.store(out_ptr + row, tl.where(token < 0, sampled, token), valid)


def take_up(token_ids: Tensor, sampled: Tensor) -> Tensor:
    """``serve.engine.forward_batch.fill_in`` as one kernel: ``[num_rows]``, int64."""
    out = torch.empty_like(token_ids)
    _take_up_kernel[(triton.cdiv(len(out), 128),)](token_ids, sampled, out, len(out), BLOCK=128)
    return out


@triton.jit(do_not_specialize=["num_rows"])
def _combine_kernel(
    parts_ptr, lse_ptr, out_ptr, num_rows, num_heads,
    NUM_SPLITS: tl.constexpr, SPLITS_BLOCK: tl.constexpr,
    DIM: tl.constexpr, DIM_BLOCK: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    if EARLY:
        _await_kernel_before()
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
        DIM=dim, DIM_BLOCK=triton.next_power_of_2(dim), **_LAUNCH,
    )  # fmt: skip
    return out


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
    Beyond its length a row holds anything.
    """
    num_rows = len(lengths)
    columns = triton.cdiv(width, num_splits)
    tables = torch.empty((num_splits * num_rows, columns), dtype=torch.int32, device=blocks.device)
    slice_lengths = torch.empty(num_splits * num_rows, dtype=torch.int32, device=blocks.device)
    block = min(1024, triton.next_power_of_2(columns))
    _slice_tables_kernel[(num_rows, num_splits, triton.cdiv(columns, block))](
        blocks, offsets, lengths, tables, slice_lengths, num_rows, columns, block_size,
        NUM_SPLITS=num_splits, BLOCK=block,
    )  # fmt: skip
    return tables, slice_lengths
