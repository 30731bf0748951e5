"""Attention through flash-attn: version 4 on Hopper and newer, version 2 on Ampere and Ada.

Both read the paged cache in place. On Hopper version 4 does not split the positions of one sequence
over the multiprocessors, so a decode batch too small to fill the GPU is split here, as in
Flash-Decoding: each row becomes several rows over slices of its blocks, and their results are
combined by their log-sum-exps.
"""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import Tensor

from serve.model.attention import PLAIN, Attention, Scoring, torch_attention
from serve.model.forward_batch import AttentionMetadata
from serve.model.kernels import ops

# Paged caches restrict version 4: head_dim above 128 must be a multiple of 64, and an odd multiple
# of 8 needs a tile as long as a block.
HEAD_DIMS = {4: (*range(16, 129, 16), 192, 256), 2: range(8, 257, 8)}
BLOCK_SIZES = {4: 64, 2: 256}  # block_size must be a multiple
_MIN_SEQLEN_Q = 256  # more than the rows of one tile
# The public function of version 4 takes no tile size. The tile it chooses on Hopper is for prefill:
# it pads the few query heads of a decode row to 128 and leaves room for one row at a time on a
# multiprocessor. With 256 rows of 1024 positions it takes 1.2 times as long as this one.
_HOPPER_TILE = (64, 128)


class FlashAttention:
    """flash-attn 4 (``flash_attn.cute``)."""

    def __init__(self, decode_tile: tuple[int, int] | None) -> None:
        """``decode_tile`` is (query rows, positions) for decode; None: the library's choice."""
        self._run: Any = importlib.import_module("flash_attn.cute.interface")._flash_attn_fwd
        self._decode_tile = decode_tile

    def __call__(
        self,
        q: Tensor,
        k_cache: Tensor,
        v_cache: Tensor,
        metadata: AttentionMetadata,
        scoring: Scoring = PLAIN,
    ) -> Tensor:
        """See ``Attention``. Decodes and prefills are separate calls, as their tiles differ."""
        count = metadata.num_decodes
        if count * metadata.num_copies(scoring.window) == len(q):
            return self._decode(q, k_cache, v_cache, metadata, scoring)
        if count == 0:
            return self._prefill(q, k_cache, v_cache, metadata, scoring)
        decoded = self._decode(q[:count], k_cache, v_cache, metadata, scoring)
        return torch.cat((decoded, self._prefill(q[count:], k_cache, v_cache, metadata, scoring)))

    def _prefill(
        self,
        q: Tensor,
        k_cache: Tensor,
        v_cache: Tensor,
        metadata: AttentionMetadata,
        scoring: Scoring,
    ) -> Tensor:
        count = metadata.num_decodes
        out: Tensor = self._run(
            q,
            k_cache,
            v_cache,
            cu_seqlens_q=metadata.cu_seqlens_prefill,
            seqused_k=metadata.seqlens_k[count:],
            # Below one tile it is another kernel, compiled when the first short prompt comes.
            max_seqlen_q=max(metadata.max_seqlen_q, _MIN_SEQLEN_Q),
            max_seqlen_k=metadata.max_seqlen_k,
            page_table=metadata.block_tables[count:],
            causal=True,
            **_options(scoring),
        )[0]
        return out

    def _decode(
        self,
        q: Tensor,
        k_cache: Tensor,
        v_cache: Tensor,
        metadata: AttentionMetadata,
        scoring: Scoring,
    ) -> Tensor:
        count, splits = metadata.num_decodes, metadata.splits
        if splits is None or scoring.window is not None:
            rows = (
                metadata.cu_seqlens_q[: count + 1],
                metadata.seqlens_k[:count],
                metadata.block_tables[:count],
            )
            max_seqlen_k = metadata.max_seqlen_k
            return self._decode_rows(q, k_cache, v_cache, *rows, max_seqlen_k, scoring)[0]
        out, lse = self._decode_rows(
            q,  # [count * num_decodes, num_heads, head_dim]: rope_write has made the copies
            k_cache,
            v_cache,
            splits.cu_seqlens_q,
            splits.seqlens_k,
            splits.block_tables,
            metadata.max_seqlen_k,
            scoring,
            return_lse=True,
        )
        return ops.combine_splits(out, lse, splits.count)

    def _decode_rows(
        self,
        q: Tensor,
        k_cache: Tensor,
        v_cache: Tensor,
        cu_seqlens_q: Tensor,
        seqlens_k: Tensor,
        block_tables: Tensor,
        max_seqlen_k: int,
        scoring: Scoring,
        *,
        return_lse: bool = False,
    ) -> tuple[Tensor, Tensor]:
        """Return ``[num_rows, num_heads, head_dim]`` and, with ``return_lse``, log-sum-exps.

        Log-sum-exps are ``[num_heads, num_rows]``, float32.
        """
        out, lse, *_ = self._run(
            q,
            k_cache,
            v_cache,
            cu_seqlens_q=cu_seqlens_q,
            seqused_k=seqlens_k,
            max_seqlen_q=1,
            max_seqlen_k=max_seqlen_k,
            page_table=block_tables,
            tile_mn=self._decode_tile,
            return_lse=return_lse,
            **_options(scoring),
        )
        return out, lse


def _options(scoring: Scoring) -> dict[str, Any]:
    """Return version 4's arguments. Its window does not count the query's own position."""
    options: dict[str, Any] = {"softmax_scale": scoring.scale, "softcap": scoring.softcap}
    if scoring.window is not None:
        options |= {"window_size_left": scoring.window - 1, "window_size_right": 0}
    return options


class FlashAttention2:
    """flash-attn 2 (``flash_attn``), which splits long decode rows itself."""

    def __init__(self) -> None:
        self._run: Any = importlib.import_module("flash_attn").flash_attn_varlen_func

    def __call__(
        self,
        q: Tensor,
        k_cache: Tensor,
        v_cache: Tensor,
        metadata: AttentionMetadata,
        scoring: Scoring = PLAIN,
    ) -> Tensor:
        left = -1 if scoring.window is None else scoring.window - 1
        out: Tensor = self._run(
            q,
            k_cache,
            v_cache,
            cu_seqlens_q=metadata.cu_seqlens_q,
            cu_seqlens_k=torch.nn.functional.pad(metadata.seqlens_k.cumsum(0), (1, 0)).int(),
            max_seqlen_q=metadata.max_seqlen_q,
            max_seqlen_k=metadata.max_seqlen_k,
            softmax_scale=scoring.scale,
            causal=True,
            window_size=(left, 0 if scoring.window is not None else -1),
            softcap=scoring.softcap or 0.0,
            block_table=metadata.block_tables,
        )
        return out


def preferred_block_size(device: torch.device) -> int:
    """Return the default block size (tokens per block) of the KV cache."""
    if device.type == "cpu":
        return 16
    if torch.cuda.get_device_capability(device)[0] >= 9:
        # A block that equals a decode tile is loaded by the multiprocessor's copy engine (TMA).
        return 128
    return 256


def choose_attention(
    device: torch.device, dtype: torch.dtype, head_dim: int, block_size: int
) -> tuple[Attention, str]:
    """Choose the attention function for this device; return it with its name for the log.

    The torch version, exact and slow, serves the CPU and float32. Raises ``ValueError`` if the
    package for the GPU is missing, or does not support ``head_dim`` or ``block_size``.
    """
    if device.type == "cpu":
        return torch_attention, "torch"
    if dtype not in (torch.float16, torch.bfloat16):
        return torch_attention, f"torch (flash-attn has no {dtype})"
    major = torch.cuda.get_device_capability(device)[0]
    version = 4 if major >= 9 else 2
    if head_dim not in HEAD_DIMS[version]:
        raise ValueError(
            f"flash-attn {version} does not support head_dim {head_dim} with a paged KV cache; use "
            "--dtype float32, which runs without it"
        )
    unit = BLOCK_SIZES[version]
    if block_size % unit:
        raise ValueError(f"flash-attn {version} needs a --block-size that is a multiple of {unit}")
    package, extra = {4: ("flash_attn.cute", "gpu"), 2: ("flash_attn", "gpu-fa2")}[version]
    try:
        importlib.import_module(package)
    except ImportError as error:
        raise ValueError(
            f"attention on this GPU needs the optional dependencies serve[{extra}]: {error}"
        ) from error
    if version == 2:
        return FlashAttention2(), "flash-attn 2"
    return FlashAttention(_HOPPER_TILE if major == 9 and head_dim <= 128 else None), "flash-attn 4"
