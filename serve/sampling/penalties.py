"""Repetition, frequency and presence penalties, from token counts that stay on the device.

The tokens of a request may be as many as its context is long, so they are not counted anew for
every token. A request is counted once. Then each step adds the row's input token on the device,
because the host may not know that token yet.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from serve.device import columns_to_device, to_device
from serve.protocol.plan import SampleRow
from serve.sampling.parts import split
from serve.sampling.penalised_rows import PenalisedRows
from serve.sampling.placed_rows import PlacedRows

# A count holds the number of times that the output has a token in its upper bits. Its lowest bit
# says whether the prompt has the token.
_IN_PROMPT = 1
_ONE_OUTPUT = 2
_MAX_IDS = 1 << 20  # in one copy to the device: 8 MiB, for which warm_up has pinned memory
_CHUNK_ELEMENTS = 1 << 20  # bounds the memory of the reference
_NOT_COUNTED = -1


class Penalties:
    """The token counts of each slot, on the device."""

    def __init__(self, num_slots: int) -> None:
        self._counts: Tensor | None = None  # [num_slots, vocab_size], int32; from the first use
        # The only output position of each slot that its counts are valid for.
        self._next_indices = np.full(num_slots, _NOT_COUNTED, np.int64)

    def forget(self, slots: Sequence[int]) -> None:
        """Drop the counts of slots that other requests have taken over."""
        self._next_indices[slots] = _NOT_COUNTED

    def apply(self, logits: Tensor, placed: PlacedRows, input_ids: Tensor) -> None:
        """Penalise the earlier tokens of the rows in ``logits``, in place.

        The repetition penalty counts prompt and output, the others output only. ``logits`` is
        ``[num_rows, vocab_size]``, float32. ``input_ids`` (``[num_rows]``, int64) is each row's
        newest token. No two penalised rows may belong to one request.
        """
        index = np.flatnonzero(placed.params["is_penalised"])
        if not len(index):
            return
        if self._counts is None:
            shape = len(self._next_indices), logits.shape[1]
            self._counts = torch.zeros(shape, dtype=torch.int32, device=logits.device)
        penalised = placed.select(index)
        self._catch_up(penalised, self._counts)
        columns = _make_columns(index, penalised, logits.device)
        if logits.is_cuda:
            from serve.sampling.triton_penalties import penalise  # needs Triton, as GPUs do

            penalise(logits, self._counts, input_ids, columns)
        else:
            _penalise(logits, self._counts, input_ids, columns)

    def _catch_up(self, penalised: PlacedRows, counts: Tensor) -> None:
        """Count the rows whose counts are not valid, except for their newest output token."""
        slots, indices = penalised.slots, penalised.output_indices
        stale = np.flatnonzero(self._next_indices[slots] != indices).tolist()
        self._next_indices[slots] = indices + 1
        uncounted = {int(slots[i]): penalised.rows[i] for i in stale}
        for part in split(uncounted, lambda row: len(row.token_ids), _MAX_IDS):
            _count(part, counts)


def _make_columns(index: np.ndarray, rows: PlacedRows, device: torch.device) -> PenalisedRows:
    increments = _ONE_OUTPUT * (rows.output_indices > 0)
    columns = [
        torch.from_numpy(index),
        torch.from_numpy(rows.slots),
        torch.from_numpy(increments.astype(np.int32)),
        rows.column("repetition"),
        rows.column("frequency"),
        rows.column("presence"),
    ]
    return PenalisedRows(*columns_to_device(columns, device))


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
    """Do what ``serve.sampling.triton_penalties.penalise`` does, some rows after others."""
    rows, slots = penalised.row_ids, penalised.slots
    vocab_size = counts.shape[1]
    counts.view(-1).index_add_(0, slots * vocab_size + input_ids[rows], penalised.increments)
    chunk = max(1, _CHUNK_ELEMENTS // vocab_size)
    for start in range(0, len(rows), chunk):
        part = slice(start, start + chunk)
        count, logit = counts[slots[part]], logits[rows[part]]  # [chunk, vocab_size]
        num_outputs = count.div(_ONE_OUTPUT, rounding_mode="floor")
        amount = num_outputs * penalised.frequency[part, None]
        amount += (num_outputs > 0) * penalised.presence[part, None]
        factor = penalised.repetition[part, None]
        repeated = torch.where(logit > 0, logit / factor, logit * factor)
        logits[rows[part]] = torch.where(count > 0, repeated, logit) - amount
