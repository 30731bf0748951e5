"""Repetition, frequency and presence penalties, by counts that stay on the device.

What a request has had may be as long as its context, so it is not looked through again for every
token. It is counted once, and each step adds the row's input, which the host need not know yet.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from serve.device import columns_to_device, to_device
from serve.protocol.messages import SampleRow

# A count: how often the output has a token in the upper bits, whether the prompt has it in the
# lowest.
_IN_PROMPT = 1
_ONE_OUTPUT = 2
_MAX_IDS = 1 << 20  # of one copy to the device: 8 MiB, for which warm_up has pinned memory


@dataclass(slots=True)
class _Place:
    """Where a request is counted, and the only output index that the counts are good for."""

    index: int
    output_index: int | None = None


class Penalties:
    """The counts of the requests that were sampled last, as many as a step may have rows.

    Nobody need say when a request ends: it loses its place to another, and would be counted anew if
    it were sampled again. No two requests may ever have the same id.
    """

    def __init__(self, max_num_rows: int) -> None:
        self._max_num_rows = max_num_rows
        self._counts: Tensor | None = None  # [max_num_rows, vocab_size], int32; from the first use
        self._places: dict[str, _Place] = {}  # by request id, the one not sampled for longest first

    def apply(self, logits: Tensor, rows: Sequence[SampleRow], input_ids: Tensor) -> None:
        """Penalise what ``rows`` have had: ``[num_rows, vocab_size]`` float32, in place.

        The repetition penalty is over prompt and output, the others over output. ``input_ids``
        (``[num_rows]``, int64): the newest token that each row has had. No two rows are of one
        request. ``KeyError`` for more rows with penalties than there are places.
        """
        some = [i for i, row in enumerate(rows) if row.request.sampling.has_penalties]
        if not some:
            return
        if self._counts is None:
            shape = self._max_num_rows, logits.shape[1]
            self._counts = torch.zeros(shape, dtype=torch.int32, device=logits.device)
        chosen = [rows[i] for i in some]
        params = [row.request.sampling for row in chosen]
        columns = [
            torch.tensor(some, dtype=torch.int64),
            torch.tensor(self._find(chosen, self._counts), dtype=torch.int64),
            torch.tensor([_ONE_OUTPUT * (row.output_index > 0) for row in chosen]).int(),
            torch.tensor([p.repetition_penalty for p in params], dtype=torch.float32),
            torch.tensor([p.frequency_penalty for p in params], dtype=torch.float32),
            torch.tensor([p.presence_penalty for p in params], dtype=torch.float32),
        ]
        moved = columns_to_device(columns, logits.device)
        if logits.is_cuda:
            from serve.sampling.triton_penalties import penalise  # needs Triton, as GPUs do

            penalise(logits, self._counts, input_ids, *moved)
        else:
            _penalise(logits, self._counts, input_ids, *moved)

    def _find(self, rows: Sequence[SampleRow], counts: Tensor) -> list[int]:
        """Where in ``counts`` each of ``rows`` is, complete but for its newest output token."""
        unknown: dict[int, SampleRow] = {}
        # Those that have a place first: to lose it to another row of the same step would be to be
        # counted anew.
        for row in sorted(rows, key=lambda row: row.request.id not in self._places):
            place = self._places.pop(row.request.id, None) or _Place(self._vacate())
            if place.output_index != row.output_index:
                unknown[place.index] = row
            place.output_index = row.output_index + 1
            self._places[row.request.id] = place
        for part in _parts(unknown):
            _count(part, counts)
        return [self._places[row.request.id].index for row in rows]

    def _vacate(self) -> int:
        if len(self._places) < self._max_num_rows:
            return len(self._places)
        longest_unused = next(iter(self._places))
        return self._places.pop(longest_unused).index


def _parts(rows: dict[int, SampleRow]) -> Iterator[dict[int, SampleRow]]:
    """``rows`` by their places, as many at once as one copy holds."""
    part: dict[int, SampleRow] = {}
    num_ids = 0
    for index, row in rows.items():
        if part and num_ids + len(row.token_ids) > _MAX_IDS:
            yield part
            part, num_ids = {}, 0
        part[index] = row
        num_ids += len(row.token_ids)
    if part:
        yield part


def _count(rows: dict[int, SampleRow], counts: Tensor) -> None:
    """Count what ``rows`` had before their newest output token, each at its place."""
    vocab_size, device = counts.shape[1], counts.device
    prompts, outputs = [], []
    for index, row in rows.items():
        begin = len(row.request.prompt_ids)
        known = row.token_ids[begin : begin + max(0, row.output_index - 1)]
        prompt = row.request.prompt_ids if row.request.sampling.repetition_penalty != 1.0 else ()
        prompts.append(np.array(prompt, np.int64) + index * vocab_size)
        outputs.append(np.array(known, np.int64) + index * vocab_size)
    counts.index_fill_(0, to_device(list(rows), torch.int64, device), 0)
    flat = counts.view(-1)
    in_prompt = to_device(np.concatenate(prompts), torch.int64, device)
    flat.index_fill_(0, in_prompt, _IN_PROMPT)
    in_output = to_device(np.concatenate(outputs), torch.int64, device)
    flat.index_add_(0, in_output, torch.full_like(in_output, _ONE_OUTPUT, dtype=counts.dtype))


def _penalise(
    logits: Tensor,
    counts: Tensor,
    input_ids: Tensor,
    rows: Tensor,
    places: Tensor,
    added: Tensor,
    repetition: Tensor,
    frequency: Tensor,
    presence: Tensor,
) -> None:
    """``serve.sampling.triton_penalties.penalise``, one row after another."""
    counts.view(-1).index_add_(0, places * counts.shape[1] + input_ids[rows], added)
    for entry, (row, place) in enumerate(zip(rows.tolist(), places.tolist(), strict=True)):
        count, logit = counts[place], logits[row]
        num_outputs = count.div(_ONE_OUTPUT, rounding_mode="floor")
        amount = num_outputs * frequency[entry] + (num_outputs > 0) * presence[entry]
        repeated = torch.where(logit > 0, logit / repetition[entry], logit * repetition[entry])
        logits[row] = torch.where(count > 0, repeated, logit) - amount
