"""Repetition, frequency and presence penalties, for many rows at once and without waiting for any.

A token id of a row's history becomes a place in ``[num_rows, vocab]``. What was seen, and how
often, is then a matter of filling and adding at these places, on the device. On the host a history
costs a copy of its bytes a step.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor

from serve.comm.messages import SampleRow
from serve.engine.device_copy import to_device

_MAX_PLACES = 1 << 20  # of one copy to the device: 8 MiB, for which warm_up has pinned memory
_MAX_ELEMENTS = 1 << 24  # of logits that are worked on at once


def penalise(logits: Tensor, rows: Sequence[SampleRow], input_ids: Tensor) -> None:
    """Penalise what ``rows`` have had: ``[num_rows, vocab]`` float32, in place.

    The repetition penalty is over prompt and output, the others over output. ``input_ids``
    (``[num_rows]``, int64): the last token of each row's input, which is looked at where the host
    does not know it yet.
    """
    some = [i for i, row in enumerate(rows) if row.request.sampling.has_penalties]
    for part in _parts(rows, some, max(1, _MAX_ELEMENTS // logits.shape[1])):
        index = to_device(part, torch.int64, logits.device)
        chosen = [rows[i] for i in part]
        logits[index] = _penalised(logits[index], chosen, input_ids[index])


def _parts(rows: Sequence[SampleRow], some: Iterable[int], most: int) -> Iterator[list[int]]:
    """``some`` of the rows, at most ``most`` at once, with histories that one copy holds."""
    part: list[int] = []
    num_places = 0
    for index in some:
        count = len(rows[index].prompt_ids) + len(rows[index].output_ids)
        if part and (len(part) == most or num_places + count > _MAX_PLACES):
            yield part
            part, num_places = [], 0
        part.append(index)
        num_places += count
    if part:
        yield part


def _penalised(logits: Tensor, rows: Sequence[SampleRow], input_ids: Tensor) -> Tensor:
    device, vocab = logits.device, logits.shape[1]
    outputs = _places([row.output_ids for row in rows], vocab, device)
    pending = to_device([i for i, row in enumerate(rows) if row.is_pending], torch.int64, device)
    counts = torch.zeros_like(logits)
    # Whole numbers: their sum does not depend on the order.
    for places in (outputs, pending * vocab + input_ids[pending]):
        counts.view(-1).index_add_(0, places, torch.ones_like(places, dtype=counts.dtype))
    seen = counts > 0
    chosen = [row.request.sampling for row in rows]
    columns = [
        [params.repetition_penalty for params in chosen],
        [params.frequency_penalty for params in chosen],
        [params.presence_penalty for params in chosen],
    ]
    moved = to_device(columns, torch.float32, device)[:, :, None]  # [3, num_rows, 1]
    repetition, frequency, presence = moved.unbind()
    amount = counts * frequency + seen * presence
    seen.view(-1).index_fill_(0, _places([row.prompt_ids for row in rows], vocab, device), True)
    repeated = torch.where(logits > 0, logits / repetition, logits * repetition)
    return torch.where(seen, repeated, logits) - amount


def _places(histories: Sequence[Sequence[int]], vocab: int, device: torch.device) -> Tensor:
    """Where each token of each row's history is in ``[num_rows, vocab]``: ``[num_ids]``, int64."""
    ids = array("i")
    for history in histories:
        ids.extend(history)
    if not ids:
        return torch.empty(0, dtype=torch.int64, device=device)
    lengths = torch.tensor([len(history) for history in histories])
    rows = torch.arange(len(histories)).repeat_interleave(lengths)
    return to_device(torch.frombuffer(ids, dtype=torch.int32) + rows * vocab, torch.int64, device)
