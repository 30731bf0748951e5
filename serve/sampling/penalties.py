"""Repetition, frequency and presence penalties, from token counts that stay on the device.

The tokens of a request may be as many as its context is long, so they are not counted anew for
every token. A request is counted once. Then each step adds the row's input token on the device,
because the host may not know that token yet.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from serve.device import columns_to_device, to_device
from serve.protocol.messages import SampleRow
from serve.sampling.penalised_rows import PenalisedRows

# A count holds the number of times that the output has a token in its upper bits. Its lowest bit
# says whether the prompt has the token.
_IN_PROMPT = 1
_ONE_OUTPUT = 2
_MAX_IDS = 1 << 20  # in one copy to the device: 8 MiB, for which warm_up has pinned memory


@dataclass(slots=True)
class _Slot:
    """The row of the counts that a request owns."""

    index: int
    output_index: int | None = None  # the only output position that the counts are valid for


class Penalties:
    """The token counts of the most recently sampled requests: one slot for each row of a step.

    The end of a request is not reported here. Another request takes over its slot, and a request
    without a slot is counted anew when it is sampled again. Request ids must be unique for the
    life of the process.
    """

    def __init__(self, max_num_rows: int) -> None:
        self._max_num_rows = max_num_rows
        self._counts: Tensor | None = None  # [max_num_rows, vocab_size], int32; from the first use
        self._slots: dict[str, _Slot] = {}  # by request id, least recently sampled first

    def apply(self, logits: Tensor, rows: Sequence[SampleRow], input_ids: Tensor) -> None:
        """Penalise the earlier tokens of ``rows`` in ``logits``, in place.

        The repetition penalty counts prompt and output, the others output only. ``logits`` is
        ``[num_rows, vocab_size]``, float32. ``input_ids`` (``[num_rows]``, int64) is each row's
        newest token. No two rows may belong to one request. Raises ``KeyError`` if more rows have
        penalties than there are slots.
        """
        row_ids = [i for i, row in enumerate(rows) if row.request.sampling.has_penalties]
        if not row_ids:
            return
        if self._counts is None:
            shape = self._max_num_rows, logits.shape[1]
            self._counts = torch.zeros(shape, dtype=torch.int32, device=logits.device)
        penalised = [rows[i] for i in row_ids]
        slots = self._assign_slots(penalised, self._counts)
        columns = _make_columns(row_ids, penalised, slots, logits.device)
        if logits.is_cuda:
            from serve.sampling.triton_penalties import penalise  # needs Triton, as GPUs do

            penalise(logits, self._counts, input_ids, columns)
        else:
            _penalise(logits, self._counts, input_ids, columns)

    def _assign_slots(self, rows: Sequence[SampleRow], counts: Tensor) -> list[int]:
        """Return the slot of each row, counted except for its newest output token."""
        uncounted: dict[int, SampleRow] = {}
        # Rows that have a slot come first. Otherwise another row of the same step could take the
        # slot, and they would be counted anew.
        for row in sorted(rows, key=lambda row: row.request.id not in self._slots):
            slot = self._slots.pop(row.request.id, None) or _Slot(self._free_slot())
            if slot.output_index != row.output_index:
                uncounted[slot.index] = row
            slot.output_index = row.output_index + 1
            self._slots[row.request.id] = slot
        for part in _split(uncounted):
            _count(part, counts)
        return [self._slots[row.request.id].index for row in rows]

    def _free_slot(self) -> int:
        if len(self._slots) < self._max_num_rows:
            return len(self._slots)
        least_recent = next(iter(self._slots))
        return self._slots.pop(least_recent).index


def _make_columns(
    row_ids: list[int], rows: Sequence[SampleRow], slots: list[int], device: torch.device
) -> PenalisedRows:
    params = [row.request.sampling for row in rows]
    columns = [
        torch.tensor(row_ids, dtype=torch.int64),
        torch.tensor(slots, dtype=torch.int64),
        torch.tensor([_ONE_OUTPUT * (row.output_index > 0) for row in rows]).int(),
        torch.tensor([p.repetition_penalty for p in params], dtype=torch.float32),
        torch.tensor([p.frequency_penalty for p in params], dtype=torch.float32),
        torch.tensor([p.presence_penalty for p in params], dtype=torch.float32),
    ]
    return PenalisedRows(*columns_to_device(columns, device))


def _split(rows: dict[int, SampleRow]) -> Iterator[dict[int, SampleRow]]:
    """Split ``rows`` (by slot) into parts of at most ``_MAX_IDS`` tokens, or of one row."""
    part: dict[int, SampleRow] = {}
    num_ids = 0
    for slot, row in rows.items():
        if part and num_ids + len(row.token_ids) > _MAX_IDS:
            yield part
            part, num_ids = {}, 0
        part[slot] = row
        num_ids += len(row.token_ids)
    if part:
        yield part


def _count(rows: dict[int, SampleRow], counts: Tensor) -> None:
    """Count the tokens of ``rows`` (by slot) except for the newest output token of each."""
    vocab_size, device = counts.shape[1], counts.device
    prompts, outputs = [], []
    for slot, row in rows.items():
        begin = len(row.request.prompt_ids)
        output = row.token_ids[begin : begin + max(0, row.output_index - 1)]
        prompt = row.request.prompt_ids if row.request.sampling.repetition_penalty != 1.0 else ()
        prompts.append(np.array(prompt, np.int64) + slot * vocab_size)
        outputs.append(np.array(output, np.int64) + slot * vocab_size)
    counts.index_fill_(0, to_device(list(rows), torch.int64, device), 0)
    flat = counts.view(-1)
    in_prompt = to_device(np.concatenate(prompts), torch.int64, device)
    flat.index_fill_(0, in_prompt, _IN_PROMPT)
    in_output = to_device(np.concatenate(outputs), torch.int64, device)
    flat.index_add_(0, in_output, torch.full_like(in_output, _ONE_OUTPUT, dtype=counts.dtype))


def _penalise(logits: Tensor, counts: Tensor, input_ids: Tensor, penalised: PenalisedRows) -> None:
    """Do what ``serve.sampling.triton_penalties.penalise`` does, one row after another."""
    rows, slots = penalised.row_ids, penalised.slots
    flat_ids = slots * counts.shape[1] + input_ids[rows]
    counts.view(-1).index_add_(0, flat_ids, penalised.increments)
    for i, (row, slot) in enumerate(zip(rows.tolist(), slots.tolist(), strict=True)):
        count, logit = counts[slot], logits[row]
        factor = penalised.repetition[i]
        num_outputs = count.div(_ONE_OUTPUT, rounding_mode="floor")
        amount = num_outputs * penalised.frequency[i] + (num_outputs > 0) * penalised.presence[i]
        repeated = torch.where(logit > 0, logit / factor, logit * factor)
        logits[row] = torch.where(count > 0, repeated, logit) - amount
