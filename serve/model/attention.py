"""Attention over the paged KV cache; the torch version, which is the reference for faster ones."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import groupby
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional

from serve.model.forward_batch import AttentionMetadata

# Positions gathered at a time for decode rows: 1 GiB for 8 KV heads of 128 in a 16-bit type.
MAX_GATHERED_POSITIONS = 2**18


@dataclass(frozen=True, slots=True)
class Scoring:
    """How a layer weighs positions."""

    scale: float | None = None  # of scores; None: 1 / sqrt(head_dim)
    window: int | None = None  # positions that a token sees, its own counted; None: all before
    softcap: float | None = None  # scores become cap * tanh(score / cap)


PLAIN = Scoring()


class Attention(Protocol):
    """What a model calls in every layer; chosen once, at start."""

    def __call__(
        self,
        q: Tensor,
        k_cache: Tensor,
        v_cache: Tensor,
        metadata: AttentionMetadata,
        scoring: Scoring = PLAIN,
    ) -> Tensor:
        """Each query's mix of the values at positions up to its own.

        ``q``: ``[num_tokens, num_heads, head_dim]``, and as often as ``metadata.num_copies`` says.
        ``k_cache``, ``v_cache``: ``[num_blocks, block_size, num_kv_heads, head_dim]``, the new
        tokens already in; what lies before every window does not count, but may be read, and must
        be finite. Query head ``i`` reads KV head ``i // (num_heads // num_kv_heads)``. Returns
        ``[num_tokens, num_heads, head_dim]``.
        """
        ...


def torch_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    metadata: AttentionMetadata,
    scoring: Scoring = PLAIN,
) -> Tensor:
    """Gather and scaled dot product: prefill sequences one by one, decode rows together."""
    out = torch.empty_like(q)
    row = 0
    lengths = metadata.query_lengths
    for single, run in groupby(range(len(lengths)), key=lambda index: lengths[index] == 1):
        indices = list(run)
        if single:  # neighbouring decode rows: one slice of everything, no index to copy
            stop = row + len(indices)
            out[row:stop] = _decode(q[row:stop], k_cache, v_cache, metadata, indices, scoring)
            row = stop
            continue
        for index in indices:
            stop = row + lengths[index]
            first = _first_seen(metadata.key_lengths[index] - lengths[index], scoring.window)
            keys = _history(k_cache, metadata, index, first)
            values = _history(v_cache, metadata, index, first)
            out[row:stop] = _prefill(q[row:stop], keys, values, scoring)
            row = stop
    return out


def _first_seen(position: int, window: int | None) -> int:
    """The first position that a token at ``position`` sees."""
    return 0 if window is None else max(0, position + 1 - window)


def _history(cache: Tensor, metadata: AttentionMetadata, index: int, first: int) -> Tensor:
    """One sequence's keys or values from ``first`` on, ``[length, num_kv_heads, head_dim]``."""
    length, block_size = metadata.key_lengths[index], cache.shape[1]
    begin = first // block_size
    blocks = metadata.block_tables[index, begin : -(-length // block_size)]
    start = begin * block_size
    return cache[blocks].flatten(0, 1)[first - start : length - start]


def _prefill(q: Tensor, k: Tensor, v: Tensor, scoring: Scoring) -> Tensor:
    """Causal attention of the last ``len(q)`` of ``k``'s positions over those before."""
    group = q.shape[1] // k.shape[1]
    new, total = q.shape[0], k.shape[0]
    mask = None
    window = scoring.window
    if new < total or (window is not None and window < total):
        # Row i is position total - new + i.
        mask = torch.ones(new, total, dtype=torch.bool, device=q.device).tril(total - new)
        if window is not None:
            mask = mask.triu(total - new - window + 1)
    out = _mix(
        q.transpose(0, 1)[None],  # [1, num_heads, new, head_dim]
        k.repeat_interleave(group, dim=1).transpose(0, 1)[None],
        v.repeat_interleave(group, dim=1).transpose(0, 1)[None],
        mask,
        scoring,
    )
    return out[0].transpose(0, 1)


def _mix(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scoring: Scoring) -> Tensor:
    """Softmax of the scores over the positions of ``mask`` (None: causal), times the values."""
    if scoring.softcap is None:
        return functional.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=mask is None, scale=scoring.scale
        )
    scale = q.shape[-1] ** -0.5 if scoring.scale is None else scoring.scale
    scores = scoring.softcap * torch.tanh(q @ k.transpose(-1, -2) * scale / scoring.softcap)
    if mask is None:
        mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).tril()
    weights = scores.masked_fill(~mask, float("-inf")).softmax(-1, dtype=torch.float32)
    return weights.to(q.dtype) @ v


def _decode(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    metadata: AttentionMetadata,
    indices: list[int],
    scoring: Scoring,
) -> Tensor:
    """One query per sequence, for neighbouring sequences ``indices``; ``q`` has their rows."""
    longest = max(metadata.key_lengths[index] for index in indices)
    step = max(1, MAX_GATHERED_POSITIONS // longest)
    parts = []
    for begin in range(0, len(indices), step):
        chosen = slice(indices[begin], indices[min(begin + step, len(indices)) - 1] + 1)
        tables, lengths = metadata.block_tables[chosen], metadata.seqlens_k[chosen]
        rows = q[begin : begin + step]
        parts.append(_decode_rows(rows, k_cache, v_cache, tables, lengths, longest, scoring))
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _decode_rows(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    tables: Tensor,
    lengths: Tensor,
    longest: int,
    scoring: Scoring,
) -> Tensor:
    block_size, num_kv_heads = k_cache.shape[1:3]
    at = torch.arange(longest, device=q.device)  # positions
    valid = at < lengths[:, None]  # [rows, longest]
    if scoring.window is not None:
        valid &= at >= lengths[:, None] - scoring.window
    # Beyond what it sees a sequence reads its own last position again, never another's memory:
    # what is masked out is still multiplied by zero, and a NaN there would spread.
    at = at.where(valid, lengths[:, None] - 1)
    blocks, offsets = tables.gather(1, at // block_size), at % block_size
    keys = k_cache[blocks, offsets].transpose(1, 2)  # [rows, num_kv_heads, longest, head_dim]
    values = v_cache[blocks, offsets].transpose(1, 2)
    # The heads of a group are the queries of one KV head.
    grouped = q.view(len(q), num_kv_heads, -1, q.shape[-1])
    return _mix(grouped, keys, values, valid[:, None, None, :], scoring).flatten(1, 2)
