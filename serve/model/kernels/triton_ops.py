"""Norms, gates and one token's products, in Triton; the formulas of ``ops``.

Arithmetic is float32 inside a kernel, and rounds where the formulas of ``ops`` round: sums of the
residual stream and normed values are of the activations' type before they go on.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from serve.model.kernels.triton_launch import IS_HOPPER, LAUNCH, await_kernel_before

_MAX_BLOCK = 8192  # elements one program holds in registers


_MAX_ROW_FEATURES = 8192  # longer rows are read as fast by the library
_ROW_BLOCK = 2048


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
        await_kernel_before()
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
        IS_HOPPER
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
        BLOCK=min(_ROW_BLOCK, triton.next_power_of_2(size)), num_warps=8, **LAUNCH,
    )  # fmt: skip
    return out


@triton.jit
def _rms_norm_kernel(
    x_ptr, residual_ptr, weight_ptr, out_ptr, x_stride, size, eps,
    ADD: tl.constexpr, AROUND_ONE: tl.constexpr, BLOCK: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    valid = at < size
    weight = tl.load(weight_ptr + at, valid, 0.0)
    if EARLY:
        await_kernel_before()
    x = tl.load(x_ptr + row * x_stride + at, valid, 0.0)
    if ADD:
        residual = tl.load(residual_ptr + row * size + at, valid, 0.0)
        x = (x.to(tl.float32) + residual.to(tl.float32)).to(residual.dtype)
        tl.store(residual_ptr + row * size + at, x, valid)
    wide = x.to(tl.float32)
    scale = tl.rsqrt(tl.sum(wide * wide, 0) / size + eps)
    out = weighted(wide * scale, weight, AROUND_ONE).to(weight.dtype)
    tl.store(out_ptr + row * size + at, out, valid)


@triton.jit
def weighted(normed, weight, AROUND_ONE: tl.constexpr):
    """Float32; rounded to the weights' type before they count, unless they count from one."""
    if AROUND_ONE:
        return normed * (1.0 + weight.to(tl.float32))
    return normed.to(weight.dtype).to(tl.float32) * weight.to(tl.float32)


def rms_norm(x: Tensor, weight: Tensor, eps: float, *, around_one: bool = False) -> Tensor:
    """``x`` (``[num_tokens, size]``) scaled to unit mean square, times ``weight`` (or one more)."""
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    _launch_norm(x, x, weight, out, eps, add=False, around_one=around_one)
    return out


def add_rms_norm(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float, *, around_one: bool = False
) -> Tensor:
    """The norm of ``residual + x``, which ``residual`` becomes."""
    out = torch.empty_like(residual)
    _launch_norm(x, residual, weight, out, eps, add=True, around_one=around_one)
    return out


def _launch_norm(
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    out: Tensor,
    eps: float,
    *,
    add: bool,
    around_one: bool,
) -> None:
    num_rows, size = x.shape
    block = triton.next_power_of_2(size)
    num_warps = 4 if block <= 2048 else 8 if block <= _MAX_BLOCK else 16
    if num_rows:
        _rms_norm_kernel[(num_rows,)](
            x, residual, weight, out, x.stride(0), size, eps,
            ADD=add, AROUND_ONE=around_one, BLOCK=block, num_warps=num_warps, **LAUNCH,
        )  # fmt: skip


@triton.jit
def _gate_kernel(
    x_ptr, out_ptr, size, IS_SILU: tl.constexpr, BLOCK: tl.constexpr, EARLY: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    valid = at < size
    if EARLY:
        await_kernel_before()
    gate = tl.load(x_ptr + row * 2 * size + at, valid, 0.0)
    up = tl.load(x_ptr + row * 2 * size + size + at, valid, 0.0)
    wide = gate.to(tl.float32)
    if not IS_SILU:
        # x * sigmoid(2y) is x * (1 + tanh(y)) / 2, the other way to write GELU with a tanh.
        cubic = 1.5957691216057308 * (wide + 0.044715 * wide * wide * wide)
        activated = wide / (1.0 + tl.exp(-cubic))
    else:
        activated = wide / (1.0 + tl.exp(-wide))
    activated = activated.to(gate.dtype).to(tl.float32)
    out = (activated * up.to(tl.float32)).to(gate.dtype)
    tl.store(out_ptr + row * size + at, out, valid)


def gate(gate_up: Tensor, activation: str) -> Tensor:
    """``[num_tokens, 2 * size]``, the gates first, to ``activation(gate) * up``.

    ``ValueError`` for another activation than silu and gelu_tanh.
    """
    if activation not in ("silu", "gelu_tanh"):
        raise ValueError(f"there is no gate with activation {activation!r}")
    num_rows, size = gate_up.shape[0], gate_up.shape[1] // 2
    out = gate_up.new_empty((num_rows, size))
    block = min(2048, triton.next_power_of_2(max(size, 1)))
    if num_rows and size:
        _gate_kernel[(num_rows, triton.cdiv(size, block))](
            gate_up, out, size, IS_SILU=activation == "silu", BLOCK=block, **LAUNCH
        )
    return out
