"""Attention through flash-attn: version 4 on Hopper and newer, version 2 on Ampere and Ada.

Both read the paged cache where it lies. Version 4 does not split the positions of one sequence over
the GPU on Hopper, so a decode batch that is too small to fill it is split here: each row becomes
several sequences over slices of its blocks, and the results are combined by their log-sum-exps.
"""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import Tensor

from serve.model.attention import PLAIN, Attention, Scoring, torch_attention
from serve.model.forward_batch import AttentionMetadata
from serve.model.kernels import ops

# Above 128 the tiles of version 4 hold the rows of a paged cache only where 64 divides the heads,
# and heads of an odd multiple of 8 only where a tile is a block.
HEAD_DIMS = {4: (*range(16, 129, 16), 192, 256), 2: range(8, 257, 8)}
BLOCK_SIZES = {4: 64, 2: 256}  # whole multiples of these
_MIN_SEQLEN_Q = 256  # above the rows of one tile
# The public function of version 4 cannot be told its tile. The one that it chooses on Hopper, made
# for prefill, pads a decode row's few query heads to 128 and leaves room for one row at a time on a
# multiprocessor: it takes 1.2 times as long as this one at 256 rows of 1024 positions.
_HOPPER_TILE = (64, 128)


class FlashAttention:
    """Version 4 (``flash_attn.cute``)."""

    def __init__(self, decode_tile: tuple[int, int] | None) -> None:
        """``decode_tile``: query rows and positions; None: as the library chooses."""
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
        """See ``Attention``. Decode rows and prefill rows are two calls: their tiles differ."""
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
            # Short prompts would be another kernel, compiled when the first of them comes.
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
            most = metadata.max_seqlen_k
            return self._decode_rows(q, k_cache, v_cache, *rows, most, scoring)[0]
        out, lse = self._decode_rows(
            q,  # a copy for each split already
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
        """Results and, if asked for, log-sum-exps ``[num_heads, num_rows]``."""
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
    """As version 4 spells them; a query's own position does not count in its window."""
    options: dict[str, Any] = {"softmax_scale": scoring.scale, "softcap": scoring.softcap}
    if scoring.window is not None:
        options |= {"window_size_left": scoring.window - 1, "window_size_right": 0}
    return options


class FlashAttention2:
    """Version 2 (``flash_attn``), which splits by itself."""

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
        """See ``Attention``."""
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
    """Tokens in a block of the KV cache where the user does not say."""
    if device.type == "cpu":
        return 16
    if torch.cuda.get_device_capability(device)[0] >= 9:
        # One tile of a decode row: it is then loaded by the copy engine of the multiprocessor.
        return 128
    return 256


def choose_attention(
    device: torch.device, dtype: torch.dtype, head_dim: int, block_size: int
) -> tuple[Attention, str]:
    """The attention for this device, and its name for the log.

    The torch version, which is exact and slow, serves the CPU and float32. ``ValueError`` if the
    package that the GPU needs is missing or ``block_size`` is not one that it reads.
    """
    if device.type == "cpu":
        return torch_attention, "torch"
    if dtype not in (torch.float16, torch.bfloat16):
        return torch_attention, f"torch (flash-attn has no {dtype})"
    major = torch.cuda.get_device_capability(device)[0]
    version = 4 if major >= 9 else 2
    if head_dim not in HEAD_DIMS[version]:
        raise ValueError(
            f"flash-attn {version} has no paged heads of {head_dim} dimensions; --dtype float32 "
            "does without it"
        )
    unit = BLOCK_SIZES[version]
    if block_size % unit:
        raise ValueError(f"flash-attn {version} reads blocks of a multiple of {unit} tokens")
    package, extra = {4: ("flash_attn.cute", "gpu"), 2: ("flash_attn", "gpu-fa2")}[version]
    try:
        importlib.import_module(package)
    except ImportError as error:
        raise ValueError(
            f"attention on this GPU needs the package of the extra {extra!r}: {error}"
        ) from error
    if version == 2:
        return FlashAttention2(), "flash-attn 2"
    return FlashAttention(_HOPPER_TILE if major == 9 and head_dim <= 128 else None), "flash-attn 4"
