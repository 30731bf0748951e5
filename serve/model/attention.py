"""Attention over the paged KV cache; the torch version, which is the reference for faster ones."""

from __future__ import annotations

from itertools import groupby
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional

from serve.engine.forward_batch import AttentionMetadata

# Positions gathered at a time for decode rows: 1 GiB for 8 KV heads of 128 in a 16-bit type.
MAX_GATHERED_POSITIONS = 2**18


class Attention(Protocol):
    """What a model calls in every layer; chosen once, at start."""

    def __call__(
        self, q: Tensor, k_cache: Tensor, v_cache: Tensor, metadata: AttentionMetadata
    ) -> Tensor:
        """Each query's mix of the values at positions up to its own.

        ``q``: ``[num_tokens, num_heads, head_dim]``. ``k_cache``, ``v_cache``: ``[num_blocks,
        block_size, num_kv_heads, head_dim]``, the new tokens already in. Query head ``i`` reads KV
        head ``i // (num_heads // num_kv_heads)``. Returns the shape of ``q``.
        """
        ...


def torch_attention(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, metadata: AttentionMetadata
) -> Tensor:
    """Gather and scaled dot product: prefill sequences one by one, decode rows together."""
    out = torch.empty_like(q)
    row = 0
    lengths = metadata.query_lengths
    for single, run in groupby(range(len(lengths)), key=lambda index: lengths[index] == 1):
        indices = list(run)
        if single:  # neighbouring decode rows: one slice of everything, no index to copy
            stop = row + len(indices)
            out[row:stop] = _decode(q[row:stop], k_cache, v_cache, metadata, indices)
            row = stop
            continue
        for index in indices:
            stop = row + lengths[index]
            keys = _history(k_cache, metadata, index)
            values = _history(v_cache, metadata, index)
            out[row:stop] = _prefill(q[row:stop], keys, values)
            row = stop
    return out


def _history(cache: Tensor, metadata: AttentionMetadata, index: int) -> Tensor:
    """One sequence's keys or values in order, ``[length, num_kv_heads, head_dim]``."""
    length = metadata.key_lengths[index]
    num_blocks = -(-length // cache.shape[1])
    return cache[metadata.block_tables[index, :num_blocks]].flatten(0, 1)[:length]


def _prefill(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Causal attention of the last ``len(q)`` positions of a sequence over all of it."""
    group = q.shape[1] // k.shape[1]
    new, total = q.shape[0], k.shape[0]
    mask = None
    if new < total:  # row i is position total - new + i
        mask = torch.ones(new, total, dtype=torch.bool, device=q.device).tril(total - new)
    out = functional.scaled_dot_product_attention(
        q.transpose(0, 1)[None],  # [1, num_heads, new, head_dim]
        k.repeat_interleave(group, dim=1).transpose(0, 1)[None],
        v.repeat_interleave(group, dim=1).transpose(0, 1)[None],
        attn_mask=mask,
        is_causal=mask is None,
    )
    return out[0].transpose(0, 1)


def _decode(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, metadata: AttentionMetadata, indices: list[int]
) -> Tensor:
    """One query per sequence, for neighbouring sequences ``indices``; ``q`` has their rows."""
    longest = max(metadata.key_lengths[index] for index in indices)
    step = max(1, MAX_GATHERED_POSITIONS // longest)
    parts = []
    for begin in range(0, len(indices), step):
        chosen = slice(indices[begin], indices[min(begin + step, len(indices)) - 1] + 1)
        tables, lengths = metadata.block_tables[chosen], metadata.seqlens_k[chosen]
        rows = q[begin : begin + step]
        parts.append(_decode_rows(rows, k_cache, v_cache, tables, lengths, longest))
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _decode_rows(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, tables: Tensor, lengths: Tensor, longest: int
) -> Tensor:
    block_size, num_kv_heads = k_cache.shape[1:3]
    at = torch.arange(longest, device=q.device)  # positions
    valid = at < lengths[:, None]  # [rows, longest]
    # Beyond its end a sequence reads its own first position again, never another's memory: what
    # is masked out is still multiplied by zero, and a NaN there would spread.
    at = at.where(valid, 0)
    blocks, offsets = tables.gather(1, at // block_size), at % block_size
    keys = k_cache[blocks, offsets].transpose(1, 2)  # [rows, num_kv_heads, longest, head_dim]
    values = v_cache[blocks, offsets].transpose(1, 2)
    out = functional.scaled_dot_product_attention(
        q.view(
            len(q), num_kv_heads, -1, q.shape[-1]
        ),  # the heads of a group are the queries of one KV head
        keys,
        values,
        attn_mask=valid[:, None, None, :],
    )
    return out.flatten(1, 2)
