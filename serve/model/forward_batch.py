"""ForwardBatch: the tensors of one step that a forward pass needs beside weights and KV cache."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import chain, takewhile

import torch
from torch import Tensor

from serve.protocol.plan import Step, StepSequence


@dataclass(frozen=True, slots=True)
class DecodeSplits:
    """Split-KV decoding: each decode row becomes ``count`` rows over slices of its blocks.

    Rows are in order of splits: row ``s * num_decodes + i`` is slice ``s`` of sequence ``i``.
    """

    count: int
    cu_seqlens_q: Tensor  # [count * num_decodes + 1], int32: 0, 1, 2, ...
    seqlens_k: Tensor  # [count * num_decodes], int32; 0 for a slice without blocks
    block_tables: Tensor  # [count * num_decodes, ceil(max_blocks / count)], int32


@dataclass(frozen=True, slots=True)
class AttentionMetadata:
    """Which tokens belong to which sequence, and where each sequence's KV is stored.

    The first ``num_decodes`` sequences have one new token each. ``query_lengths`` and
    ``key_lengths`` repeat the lengths on the host, for code that needs them to launch kernels and
    must not wait for the device.
    """

    cu_seqlens_q: Tensor  # [num_seqs + 1], int32: first token of each sequence in the batch
    seqlens_k: Tensor  # [num_seqs], int32: positions including the new tokens
    max_seqlen_q: int
    max_seqlen_k: int
    block_tables: Tensor  # [num_seqs, max_blocks], int32, padded with block 0
    slot_mapping: Tensor  # [num_tokens], int64: block * block_size + offset
    query_lengths: tuple[int, ...]
    key_lengths: tuple[int, ...]
    num_decodes: int = 0
    cu_seqlens_prefill: Tensor | None = None  # [num_seqs - num_decodes + 1], without decodes
    splits: DecodeSplits | None = None  # of the decode rows; None: not split

    def num_copies(self, window: int | None) -> int:
        """Return how many copies of the queries attention takes: one per split.

        A layer with a sliding ``window`` is not split, because it reads few positions.
        """
        return 1 if self.splits is None or window is not None else self.splits.count


@dataclass(frozen=True, slots=True)
class ForwardBatch:
    """The tokens of one step, sequence after sequence, without padding."""

    token_ids: Tensor  # [num_tokens], int64
    positions: Tensor  # [num_tokens], int64
    attention: AttentionMetadata
    # [num_sampled], int64: the tokens whose next token is sampled; None: all
    sample_indices: Tensor | None


def build_forward_batch(
    step: Step, block_size: int, device: torch.device | str, sampled: Tensor | None = None
) -> ForwardBatch:
    """Build the tensors of ``step`` on ``device``.

    All int64 tensors travel in one copy and all int32 tensors in another, asynchronously on a GPU.
    ``sampled`` (int64, on ``device``) holds the tokens that the previous step sampled, by row.
    Raises ``ValueError`` if a sequence has no new token or too few blocks, or if the step refers to
    sampled tokens and there are none.
    """
    sequences = step.sequences
    _check(sequences, block_size)
    query_lengths = tuple(len(sequence.token_ids) for sequence in sequences)
    # Computed on the host; [num_seqs] unless noted.
    starts = torch.tensor([sequence.start for sequence in sequences], dtype=torch.int64)
    queries = torch.tensor(query_lengths, dtype=torch.int64)
    ends = queries.cumsum(0)
    tables = _pad([sequence.block_table for sequence in sequences])  # [num_seqs, max_blocks]
    owners = torch.repeat_interleave(queries)  # [num_tokens]: index of each token's sequence
    positions = torch.arange(len(owners)) + (starts - ends + queries)[owners]  # [num_tokens]
    blocks = tables[owners, positions // block_size].long()  # [num_tokens]
    is_sampled = torch.tensor([sequence.sample for sequence in sequences], dtype=torch.bool)
    token_ids, positions, slots, sample_indices = _to_device(
        [
            torch.tensor(list(chain.from_iterable(s.token_ids for s in sequences))),
            positions,
            blocks * block_size + positions % block_size,
            ends[is_sampled] - 1,
        ],
        torch.int64,
        device,
    )
    num_decodes = sum(1 for _ in takewhile(lambda length: length == 1, query_lengths))
    edges = torch.cat((ends.new_zeros(1), ends))
    cu_seqlens_q, cu_seqlens_prefill, seqlens_k, block_tables = _to_device(
        [edges, edges[num_decodes:] - num_decodes, starts + queries, tables], torch.int32, device
    )
    if any(sequence.token_ids[0] < 0 for sequence in sequences):
        if sampled is None:
            raise ValueError("a step refers to tokens of the previous step, and there is none")
        token_ids = fill_in(token_ids, sampled)
    key_lengths = tuple(sequence.start + len(sequence.token_ids) for sequence in sequences)
    metadata = AttentionMetadata(
        cu_seqlens_q,
        seqlens_k,
        max(query_lengths),
        max(key_lengths),
        block_tables,
        slots,
        query_lengths,
        key_lengths,
        num_decodes,
        cu_seqlens_prefill,
    )
    return ForwardBatch(token_ids, positions, metadata, sample_indices)


def fill_in(token_ids: Tensor, sampled: Tensor) -> Tensor:
    """Replace each placeholder ``sampled_by(row)`` in ``token_ids`` by ``sampled[row]``.

    ``token_ids`` is ``[num_tokens]``; see ``serve.protocol.plan.sampled_by``.
    """
    return torch.where(token_ids < 0, sampled[(-1 - token_ids).clamp_min(0)], token_ids)


def _check(sequences: Sequence[StepSequence], block_size: int) -> None:
    """Refuse a step that would write outside its sequences' blocks."""
    if not sequences:
        raise ValueError("a step without sequences has no forward pass")
    for index, sequence in enumerate(sequences):
        end = sequence.start + len(sequence.token_ids)
        if not sequence.token_ids or len(sequence.block_table) * block_size < end:
            raise ValueError(
                f"sequence {index} of a step has {len(sequence.token_ids)} new tokens up to "
                f"position {end} in {len(sequence.block_table)} blocks of {block_size}"
            )


def _pad(tables: Iterable[Sequence[int]]) -> Tensor:
    """Return ``tables`` as rows of equal length, ``[num_seqs, max_blocks]``, int32."""
    rows = [torch.tensor(table, dtype=torch.int32) for table in tables]
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)


def _to_device(
    parts: list[Tensor], dtype: torch.dtype, device: torch.device | str
) -> tuple[Tensor, ...]:
    """Copy ``parts`` to ``device`` in one copy; return views of the one buffer, of equal shapes."""
    sizes = [part.numel() for part in parts]
    on_gpu = torch.device(device).type == "cuda"
    host = torch.empty(sum(sizes), dtype=dtype, pin_memory=on_gpu)
    torch.cat([part.reshape(-1).to(dtype) for part in parts], out=host)
    # Freeing the pinned buffer early is safe: torch's cache reuses it only after the copy has run.
    buffer = host.to(device, non_blocking=on_gpu)
    flat: tuple[Tensor, ...] = torch.split(buffer, sizes)
    return tuple(view.view(part.shape) for view, part in zip(flat, parts, strict=True))
