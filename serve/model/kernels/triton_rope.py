"""Norm and rotate queries and keys and write the KV cache, as one Triton kernel."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from serve.model.kernels.head_norms import HeadNorms
from serve.model.kernels.triton_launch import LAUNCH, wait_for_previous_kernel
from serve.model.kernels.triton_ops import apply_weight

_HEADS = 8  # per program


# Not specialised on alignment, so that it is compiled once: slots are a view at any offset of the
# step's buffer.
@triton.jit(do_not_specialize_on_alignment=["slot_ptr"])
def _rope_write_kernel(
    qkv_ptr, cos_ptr, sin_ptr, q_norm_ptr, k_norm_ptr, q_ptr, k_ptr, v_ptr, slot_ptr,
    qkv_stride, block_stride, token_stride, block_size, eps,
    NUM_Q: tl.constexpr, NUM_KV: tl.constexpr, DIM: tl.constexpr, ROTARY: tl.constexpr,
    HALF_BLOCK: tl.constexpr, REST_BLOCK: tl.constexpr, HEADS: tl.constexpr,
    COPIES: tl.constexpr, HAS_NORMS: tl.constexpr, UNIT_OFFSET: tl.constexpr, USE_PDL: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    # Heads are numbered queries first, then keys, then values.
    head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)[:, None]
    half: tl.constexpr = ROTARY // 2
    exists = head < NUM_Q + 2 * NUM_KV
    offs = tl.arange(0, HALF_BLOCK)[None, :]
    tail = ROTARY + tl.arange(0, REST_BLOCK)[None, :]  # dimensions that are not rotated
    if USE_PDL:
        wait_for_previous_kernel()
    source = qkv_ptr + token * qkv_stride + head * DIM
    first = tl.load(source + offs, exists & (offs < half), 0.0)
    second = tl.load(source + half + offs, exists & (offs < half), 0.0)
    if ROTARY < DIM:
        rest = tl.load(source + tail, exists & (tail < DIM), 0.0)
    is_qk = head < NUM_Q + NUM_KV
    if HAS_NORMS:
        squares = tl.sum(first.to(tl.float32) * first.to(tl.float32), 1)
        squares += tl.sum(second.to(tl.float32) * second.to(tl.float32), 1)
        if ROTARY < DIM:
            squares += tl.sum(rest.to(tl.float32) * rest.to(tl.float32), 1)
        scale = tl.rsqrt(squares / DIM + eps)[:, None]
        norm_ptr = tl.where(head < NUM_Q, q_norm_ptr, k_norm_ptr)
        weight = tl.load(norm_ptr + offs, is_qk & (offs < half), 0.0)
        first = tl.where(is_qk, _normed(first, scale, weight, UNIT_OFFSET), first)
        weight = tl.load(norm_ptr + half + offs, is_qk & (offs < half), 0.0)
        second = tl.where(is_qk, _normed(second, scale, weight, UNIT_OFFSET), second)
        if ROTARY < DIM:
            weight = tl.load(norm_ptr + tail, is_qk & (tail < DIM), 0.0)
            rest = tl.where(is_qk, _normed(rest, scale, weight, UNIT_OFFSET), rest)
    cos = tl.load(cos_ptr + token * half + offs, offs < half, 1.0)
    sin = tl.load(sin_ptr + token * half + offs, offs < half, 0.0)
    wide_first, wide_second = first.to(tl.float32), second.to(tl.float32)
    out_first = tl.where(is_qk, wide_first * cos - wide_second * sin, wide_first).to(first.dtype)
    out_second = tl.where(is_qk, wide_second * cos + wide_first * sin, wide_second)
    out_second = out_second.to(first.dtype)
    is_query = head < NUM_Q
    for copy in tl.static_range(COPIES):
        row = copy * tl.num_programs(0) + token
        query = q_ptr + (row * NUM_Q + head) * DIM
        tl.store(query + offs, out_first, is_query & (offs < half))
        tl.store(query + half + offs, out_second, is_query & (offs < half))
        if ROTARY < DIM:
            tl.store(query + tail, rest, is_query & (tail < DIM))
    kept_first, kept_second = _finite(out_first), _finite(out_second)
    if ROTARY < DIM:
        rest = _finite(rest)
    # Padding rows of a decode graph have slot -1: they are not written.
    slot = tl.load(slot_ptr + token)
    place = (slot // block_size) * block_stride + (slot % block_size) * token_stride
    is_key = (head >= NUM_Q) & is_qk & (slot >= 0)
    key = k_ptr + place + (head - NUM_Q) * DIM
    tl.store(key + offs, kept_first, is_key & (offs < half))
    tl.store(key + half + offs, kept_second, is_key & (offs < half))
    if ROTARY < DIM:
        tl.store(key + tail, rest, is_key & (tail < DIM))
    is_value = (head >= NUM_Q + NUM_KV) & exists & (slot >= 0)
    value = v_ptr + place + (head - NUM_Q - NUM_KV) * DIM
    tl.store(value + offs, kept_first, is_value & (offs < half))
    tl.store(value + half + offs, kept_second, is_value & (offs < half))
    if ROTARY < DIM:
        tl.store(value + tail, rest, is_value & (tail < DIM))


@triton.jit
def _finite(x):
    return tl.where(tl.abs(x.to(tl.float32)) < float("inf"), x, 0.0).to(x.dtype)


@triton.jit
def _normed(x, scale, weight, UNIT_OFFSET: tl.constexpr):
    return apply_weight(x.to(tl.float32) * scale, weight, UNIT_OFFSET).to(x.dtype)


def rope_write(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    slot_mapping: Tensor,
    num_copies: int,
    norms: HeadNorms | None,
) -> Tensor:
    """See ``ops.rope_write``. Keys and values of tokens with slot -1 are not written."""
    block_size, num_kv_heads, dim = k_cache.shape[1:]
    num_heads = qkv.shape[1] // dim - 2 * num_kv_heads
    rotary = 2 * cos.shape[1]
    q = qkv.new_empty((num_copies * len(qkv), num_heads, dim))
    weights = (qkv, qkv) if norms is None else (norms.query, norms.key)
    grid = (len(qkv), triton.cdiv(num_heads + 2 * num_kv_heads, _HEADS))
    if len(qkv):
        _rope_write_kernel[grid](
            qkv, cos, sin, *weights, q, k_cache, v_cache, slot_mapping,
            qkv.stride(0), k_cache.stride(0), k_cache.stride(1), block_size,
            0.0 if norms is None else norms.eps,
            NUM_Q=num_heads, NUM_KV=num_kv_heads, DIM=dim, ROTARY=rotary,
            HALF_BLOCK=triton.next_power_of_2(rotary // 2),
            REST_BLOCK=triton.next_power_of_2(max(1, dim - rotary)),
            HEADS=_HEADS, COPIES=num_copies, HAS_NORMS=norms is not None,
            UNIT_OFFSET=norms is not None and norms.unit_offset, **LAUNCH,
        )  # fmt: skip
    return q
