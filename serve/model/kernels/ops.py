"""Operations of the layers other than attention: torch on a CPU, Triton for most on a GPU."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from serve.model.kernels.head_norms import HeadNorms


def linear(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, out: Tensor | None = None
) -> Tensor:
    """Multiply ``x`` (``[num_tokens, in_features]``) by the transpose of ``weight``, add ``bias``.

    ``weight`` is ``[out_features, in_features]``. Returns ``[num_tokens, out_features]``, written
    to ``out`` if it is given; ``out`` and ``bias`` exclude each other.
    """
    if x.is_cuda:
        from serve.model.kernels import triton_ops

        if triton_ops.prefers_row_linear(x, weight):
            return triton_ops.row_linear(x, weight, bias, out)
    if out is None:
        return functional.linear(x, weight, bias)
    return torch.mm(x, weight.t(), out=out)


def rms_norm(x: Tensor, weight: Tensor, eps: float, *, unit_offset: bool = False) -> Tensor:
    """Scale ``x`` (``[..., size]``) to unit mean square in float32, then by ``weight``.

    The norm is RMSNorm (arXiv:1910.07467). With ``unit_offset`` the factor is ``1 + weight``, and
    the product is float32, too (Gemma).
    """
    if x.is_cuda:
        from serve.model.kernels import triton_ops

        return triton_ops.rms_norm(x, weight, eps, unit_offset=unit_offset)
    wide = x.float()
    wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    if unit_offset:
        return (wide * (1.0 + weight.float())).to(x.dtype)
    return weight * wide.to(x.dtype)


def add_rms_norm(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float, *, unit_offset: bool = False
) -> Tensor:
    """Add ``x`` to ``residual`` in place and return the RMS norm of the sum.

    All are ``[num_tokens, size]``.
    """
    if x.is_cuda:
        from serve.model.kernels import triton_ops

        return triton_ops.add_rms_norm(x, residual, weight, eps, unit_offset=unit_offset)
    residual += x
    return rms_norm(residual, weight, eps, unit_offset=unit_offset)


def gate(gate_up: Tensor, activation: str) -> Tensor:
    """Return ``activation(gate) * up``, ``[num_tokens, size]``.

    ``gate_up`` is ``[num_tokens, 2 * size]``, gate first.
    """
    if gate_up.is_cuda:
        from serve.model.kernels import triton_ops

        return triton_ops.gate(gate_up, activation)
    first, up = gate_up.chunk(2, dim=-1)
    return activate(first, activation) * up


def activate(x: Tensor, activation: str) -> Tensor:
    """Apply silu, gelu, gelu_tanh or relu. Raises ``ValueError`` for another activation."""
    match activation:
        case "silu":
            return functional.silu(x)
        case "gelu":
            return functional.gelu(x)
        case "gelu_tanh":
            return functional.gelu(x, approximate="tanh")
        case "relu":
            return functional.relu(x)
    raise ValueError(f"activation {activation!r} is not supported")


def rope_write(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    slot_mapping: Tensor,
    num_copies: int = 1,
    norms: HeadNorms | None = None,
) -> Tensor:
    """Rotate queries and keys, write keys and values to the cache, and return the queries.

    With ``norms`` queries and keys are normed before the rotation. NaN and infinity are written as
    0, because attention multiplies masked positions by 0: a NaN would survive that, also in another
    sequence that reuses the block.

    Arguments:
    - ``qkv``: ``[num_tokens, (num_heads + 2 * num_kv_heads) * head_dim]``
    - ``cos``, ``sin``: ``[num_tokens, rotary_dim / 2]``, float32; dimensions of a head beyond
      ``rotary_dim`` are not rotated
    - ``k_cache``, ``v_cache``: ``[num_blocks, block_size, num_kv_heads, head_dim]``, strided
    - ``slot_mapping``: ``[num_tokens]``, int64, ``block * block_size + offset`` of each token

    Returns ``[num_copies * num_tokens, num_heads, head_dim]``, copy after copy.
    """
    if qkv.is_cuda:
        from serve.model.kernels import triton_rope

        caches = k_cache, v_cache
        return triton_rope.rope_write(qkv, cos, sin, *caches, slot_mapping, num_copies, norms)
    block_size, num_kv_heads, dim = k_cache.shape[1:]
    heads = qkv.view(len(qkv), -1, dim)  # [num_tokens, num_heads + 2 * num_kv_heads, head_dim]
    num_heads = heads.shape[1] - 2 * num_kv_heads
    q, k, v = torch.split(heads, [num_heads, num_kv_heads, num_kv_heads], dim=1)
    if norms is not None:
        q = rms_norm(q, norms.query, norms.eps, unit_offset=norms.unit_offset)
        k = rms_norm(k, norms.key, norms.eps, unit_offset=norms.unit_offset)
    blocks, offsets = slot_mapping // block_size, slot_mapping % block_size
    k_cache[blocks, offsets] = _finite(rotate(k, cos, sin))
    v_cache[blocks, offsets] = _finite(v)
    return rotate(q, cos, sin).repeat(num_copies, 1, 1)


def _finite(x: Tensor) -> Tensor:
    return torch.nan_to_num(x, nan=0.0, posinf=0.0, neginf=0.0)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate ``x`` (``[num_tokens, num_heads, head_dim]``).

    Dimension ``i`` pairs with ``i + rotary_dim / 2``.
    """
    cos, sin = cos[:, None].to(x.dtype), sin[:, None].to(x.dtype)
    half = cos.shape[-1]
    first, second, rest = torch.split(x, [half, half, x.shape[-1] - 2 * half], dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin, rest), dim=-1)


def combine_splits(parts: Tensor, lse: Tensor, num_splits: int) -> Tensor:
    """Combine attention over disjoint splits of the positions (as in Flash-Decoding).

    ``parts`` is ``[num_splits * num_rows, num_heads, head_dim]``, split after split. ``lse`` holds
    the log-sum-exps ``[num_heads, num_splits * num_rows]``, float32, -inf where a split has no
    position. Returns ``[num_rows, num_heads, head_dim]``.
    """
    if parts.is_cuda:
        from serve.model.kernels import triton_decode

        return triton_decode.combine_splits(parts, lse, num_splits)
    weights = lse.view(len(lse), num_splits, -1).softmax(dim=1)  # [num_heads, num_splits, num_rows]
    parts = parts.view(num_splits, -1, *parts.shape[1:])
    wide = torch.einsum("hsr,srhd->rhd", weights, parts.float().nan_to_num())
    return wide.to(parts.dtype)
