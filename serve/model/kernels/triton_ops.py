"""RMS norms, gates and matrix products of one token in Triton: the formulas of ``ops``.

Arithmetic is float32 inside a kernel. It rounds where the formulas of ``ops`` round: sums of the
residual stream and normed values are rounded to the activations' type before they are used.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from serve.model.kernels.triton_launch import IS_HOPPER, LAUNCH, wait_for_previous_kernel

_MAX_BLOCK = 8192  # largest row that a norm handles with 8 warps
_MAX_ROW_FEATURES = 8192  # for longer rows the library is as fast
_ROW_BLOCK = 2048


@triton.jit
def _row_linear_kernel(
    x_ptr, weight_ptr, bias_ptr, out_ptr, out_features,
    SIZE: tl.constexpr, HAS_BIAS: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, USE_PDL: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    offs = tl.arange(0, BLOCK)
    exists = (row < out_features)[:, None]
    weights = weight_ptr + row.to(tl.int64)[:, None] * SIZE + offs[None, :]
    # Weights do not depend on the previous kernel, so they are read before waiting for it.
    weight = tl.load(weights, exists & (offs < SIZE)[None, :], 0.0)
    if USE_PDL:
        wait_for_previous_kernel()
    x = tl.load(x_ptr + offs, offs < SIZE, 0.0)
    total = weight.to(tl.float32) * x.to(tl.float32)[None, :]
    for start in tl.static_range(BLOCK, SIZE, BLOCK):
        valid = offs + start < SIZE
        weight = tl.load(weights + start, exists & valid[None, :], 0.0)
        x = tl.load(x_ptr + start + offs, valid, 0.0)
        total += weight.to(tl.float32) * x.to(tl.float32)[None, :]
    out = tl.sum(total, 1)
    if HAS_BIAS:
        out += tl.load(bias_ptr + row, row < out_features, 0.0).to(tl.float32)
    tl.store(out_ptr + row, out.to(out_ptr.dtype.element_ty), row < out_features)


def prefers_row_linear(x: Tensor, weight: Tensor) -> bool:
    """Return whether ``row_linear`` is faster: for one token, on GPUs with dependent launch."""
    return (
        IS_HOPPER
        and x.shape[0] == 1
        and x.dtype in (torch.bfloat16, torch.float16)
        and 0 < weight.shape[1] <= _MAX_ROW_FEATURES
    )


def row_linear(x: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor | None) -> Tensor:
    """Multiply ``x`` (``[1, in_features]``) by the transpose of ``weight`` and add ``bias``.

    With one token nearly all the time is reading weights: at 4.0 to 4.6 TB/s here, where cuBLAS
    reaches 2.7 to 4.3. Writes to ``out`` (``[1, out_features]``), or to new memory if it is None.
    """
    out_features, size = weight.shape
    if out is None:
        out = x.new_empty((1, out_features))
    rows = 2  # per program
    _row_linear_kernel[(triton.cdiv(out_features, rows),)](
        x, weight, weight if bias is None else bias, out, out_features,
        SIZE=size, HAS_BIAS=bias is not None, ROWS=rows,
        BLOCK=min(_ROW_BLOCK, triton.next_power_of_2(size)), num_warps=8, **LAUNCH,
    )  # fmt: skip
    return out


@triton.jit
def _rms_norm_kernel(
    x_ptr, residual_ptr, weight_ptr, out_ptr, x_stride, size, eps,
    ADD: tl.constexpr, UNIT_OFFSET: tl.constexpr, BLOCK: tl.constexpr, USE_PDL: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    offs = tl.arange(0, BLOCK)
    valid = offs < size
    weight = tl.load(weight_ptr + offs, valid, 0.0)
    if USE_PDL:
        wait_for_previous_kernel()
    x = tl.load(x_ptr + row * x_stride + offs, valid, 0.0)
    if ADD:
        residual = tl.load(residual_ptr + row * size + offs, valid, 0.0)
        x = (x.to(tl.float32) + residual.to(tl.float32)).to(residual.dtype)
        tl.store(residual_ptr + row * size + offs, x, valid)
    wide = x.to(tl.float32)
    scale = tl.rsqrt(tl.sum(wide * wide, 0) / size + eps)
    out = apply_weight(wide * scale, weight, UNIT_OFFSET).to(weight.dtype)
    tl.store(out_ptr + row * size + offs, out, valid)


@triton.jit
def apply_weight(normed, weight, UNIT_OFFSET: tl.constexpr):
    """Multiply in float32; ``normed`` is rounded to the weights' type first, as in ``ops``.

    With ``UNIT_OFFSET`` the factor is ``1 + weight`` and nothing is rounded first.
    """
    if UNIT_OFFSET:
        return normed * (1.0 + weight.to(tl.float32))
    return normed.to(weight.dtype).to(tl.float32) * weight.to(tl.float32)


def rms_norm(x: Tensor, weight: Tensor, eps: float, *, unit_offset: bool = False) -> Tensor:
    """See ``ops.rms_norm``."""
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    _launch_norm(x, x, weight, out, eps, add=False, unit_offset=unit_offset)
    return out


def add_rms_norm(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float, *, unit_offset: bool = False
) -> Tensor:
    """See ``ops.add_rms_norm``."""
    out = torch.empty_like(residual)
    _launch_norm(x, residual, weight, out, eps, add=True, unit_offset=unit_offset)
    return out


def _launch_norm(
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    out: Tensor,
    eps: float,
    *,
    add: bool,
    unit_offset: bool,
) -> None:
    num_rows, size = x.shape
    block = triton.next_power_of_2(size)
    num_warps = 4 if block <= 2048 else 8 if block <= _MAX_BLOCK else 16
    if num_rows:
        _rms_norm_kernel[(num_rows,)](
            x, residual, weight, out, x.stride(0), size, eps,
            ADD=add, UNIT_OFFSET=unit_offset, BLOCK=block, num_warps=num_warps, **LAUNCH,
        )  # fmt: skip


@triton.jit
def _gate_kernel(
    x_ptr, out_ptr, size, IS_SILU: tl.constexpr, BLOCK: tl.constexpr, USE_PDL: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    offs = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    valid = offs < size
    if USE_PDL:
        wait_for_previous_kernel()
    gate = tl.load(x_ptr + row * 2 * size + offs, valid, 0.0)
    up = tl.load(x_ptr + row * 2 * size + size + offs, valid, 0.0)
    wide = gate.to(tl.float32)
    if not IS_SILU:
        # GELU with tanh: x * (1 + tanh(y)) / 2 equals x * sigmoid(2y), which needs exp alone.
        cubic = 1.5957691216057308 * (wide + 0.044715 * wide * wide * wide)
        activated = wide / (1.0 + tl.exp(-cubic))
    else:
        activated = wide / (1.0 + tl.exp(-wide))
    activated = activated.to(gate.dtype).to(tl.float32)
    out = (activated * up.to(tl.float32)).to(gate.dtype)
    tl.store(out_ptr + row * size + offs, out, valid)


def gate(gate_up: Tensor, activation: str) -> Tensor:
    """See ``ops.gate``. Raises ``ValueError`` for other activations than silu and gelu_tanh."""
    if activation not in ("silu", "gelu_tanh"):
        raise ValueError(
            f"activation {activation!r} is not supported in a gate; supported: silu, gelu_tanh"
        )
    num_rows, size = gate_up.shape[0], gate_up.shape[1] // 2
    out = gate_up.new_empty((num_rows, size))
    block = min(2048, triton.next_power_of_2(max(size, 1)))
    if num_rows and size:
        _gate_kernel[(num_rows, triton.cdiv(size, block))](
            gate_up, out, size, IS_SILU=activation == "silu", BLOCK=block, **LAUNCH
        )
    return out
