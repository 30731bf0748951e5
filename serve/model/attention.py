"""Attention over the paged KV cache in plain torch: the reference for the faster versions."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import groupby
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional

from serve.model.forward_batch import AttentionMetadata
from serve.model_config.kv_layout import num_blocks_for

# Positions gathered at a time for decode rows: keys and values of 8 KV heads of 128 dimensions in
# a 16-bit type then take 1 GiB.
MAX_GATHERED_POSITIONS = 2**18


@dataclass(frozen=True, slots=True)
class Scoring:
    """How a layer scores positions."""

    scale: float | None = None  # factor on scores; None: 1 / sqrt(head_dim)
    window: int | None = None  # positions a token attends to, itself included; None: all before
    softcap: float | None = None  # scores become cap * tanh(score / cap)


PLAIN = Scoring()


class Attention(Protocol):
    """The attention function of every layer; ``choose_attention`` selects it once, at start."""

    def __call__(
        self,
        q: Tensor,
        k_cache: Tensor,
        v_cache: Tensor,
        metadata: AttentionMetadata,
        scoring: Scoring = PLAIN,
    ) -> Tensor:
        """Attend from each query to the positions up to its own.

        ``q`` is ``[num_copies * num_tokens, num_heads, head_dim]``, copy after copy (see
        ``AttentionMetadata.num_copies``). ``k_cache`` and ``v_cache`` are
        ``[num_blocks, block_size, num_kv_heads, head_dim]`` and already contain the new tokens.
        Blocks before every window do not affect the result, but may be read, so they must be
        finite. Query head ``i`` uses KV head ``i // (num_heads // num_kv_heads)``. Returns
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
    """Gather KV, then scaled dot product: prefills one by one, neighbouring decodes together."""
    out = torch.empty_like(q)
    row = 0
    lengths = metadata.query_lengths
    for is_decode, run in groupby(range(len(lengths)), key=lambda index: lengths[index] == 1):
        indices = list(run)
        if is_decode:  # neighbouring decode rows are slices of q and metadata: no copies
            stop = row + len(indices)
            out[row:stop] = _decode(q[row:stop], k_cache, v_cache, metadata, indices, scoring)
            row = stop
            continue
        for index in indices:
            stop = row + lengths[index]
            first = _window_start(metadata.key_lengths[index] - lengths[index], scoring.window)
            keys = _history(k_cache, metadata, index, first)
            values = _history(v_cache, metadata, index, first)
            out[row:stop] = _prefill(q[row:stop], keys, values, scoring)
            row = stop
    return out


def _window_start(position: int, window: int | None) -> int:
    """Return the first position that a token at ``position`` attends to."""
    return 0 if window is None else max(0, position + 1 - window)


def _history(cache: Tensor, metadata: AttentionMetadata, index: int, first: int) -> Tensor:
    """Gather one sequence's keys or values from position ``first`` on.

    Returns ``[length - first, num_kv_heads, head_dim]``.
    """
    length, block_size = metadata.key_lengths[index], cache.shape[1]
    begin = first // block_size
    blocks = metadata.block_tables[index, begin : num_blocks_for(length, block_size)]
    start = begin * block_size
    return cache[blocks].flatten(0, 1)[first - start : length - start]


def _prefill(q: Tensor, k: Tensor, v: Tensor, scoring: Scoring) -> Tensor:
    """Attend causally from the last ``len(q)`` positions of ``k`` to all up to each.

    ``q`` is ``[new, num_heads, head_dim]``, ``k`` and ``v`` ``[total, num_kv_heads, head_dim]``.
    """
    group = q.shape[1] // k.shape[1]
    new, total = q.shape[0], k.shape[0]
    mask = None
    window = scoring.window
    if new < total or (window is not None and window < total):
        # [new, total]; row i is position total - new + i
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
    """Weigh values by the softmax of scores over the positions in ``mask`` (None: causal).

    ``q`` is ``[..., queries, head_dim]``; ``k`` and ``v`` are ``[..., positions, head_dim]``.
    """
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
    """Attend for neighbouring decode sequences ``indices``; row ``i`` of ``q`` is one query."""
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
    positions = torch.arange(longest, device=q.device)  # [longest]
    valid = positions < lengths[:, None]  # [rows, longest]
    if scoring.window is not None:
        valid &= positions >= lengths[:, None] - scoring.window
    # Masked positions read the sequence's own last position, never the memory of another sequence,
    # because a masked value is still multiplied by 0 and a NaN would survive that.
    positions = positions.where(valid, lengths[:, None] - 1)  # [rows, longest]
    blocks, offsets = tables.gather(1, positions // block_size), positions % block_size
    keys = k_cache[blocks, offsets].transpose(1, 2)  # [rows, num_kv_heads, longest, head_dim]
    values = v_cache[blocks, offsets].transpose(1, 2)
    # Query heads of one group become queries of their KV head: [rows, num_kv_heads, group, dim].
    grouped = q.view(len(q), num_kv_heads, -1, q.shape[-1])
    return _mix(grouped, keys, values, valid[:, None, None, :], scoring).flatten(1, 2)
