"""SamplingSlots: what the most recently sampled requests ask, written once for each request.

A step names the rows, and everything else follows from their slots. Lists as long as a user likes
(token counts, biases, bans) are on the device by slot. The other parameters of a slot are a record
of fixed size on the host: gathering the records of a step is one operation, and its bytes do not
depend on what is asked. So neither the host's time nor the copies of a step depend on it.

The end of a request is not reported here. There is a slot for each row of the largest step, and a
request without a slot takes over the one that was not sampled for the longest time. If a request
lost its slot while it was preempted, its state is made anew, as it is after a handover.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from serve.protocol.plan import SampleRow
from serve.request import Request, SamplingParams
from serve.sampling.penalties import Penalties
from serve.sampling.placed_rows import PARAMS, PlacedRows, encode_params
from serve.sampling.token_rules import TokenRules


class SamplingSlots:
    """The slots of one replica's leader. All methods are called in the GPU thread."""

    def __init__(self, num_slots: int, device: torch.device) -> None:
        self._penalties = Penalties(num_slots)
        self._rules = TokenRules(num_slots, device)
        self._params = np.zeros(num_slots, PARAMS)
        self._slots: dict[str, int] = {}  # by request id
        self._owners: list[tuple[str, SamplingParams] | None] = [None] * num_slots
        self._last_used = np.zeros(num_slots, np.int64)  # the number of a step
        self._step = 0

    def place(self, rows: Sequence[SampleRow]) -> PlacedRows:
        """Find the slots of a step's rows, and write the state of those that have none.

        Raises ``ValueError`` if there are more requests than slots.
        """
        num_rows = len(rows)
        slots = np.fromiter((self._find(row.request) for row in rows), np.int64, num_rows)
        indices = np.fromiter((row.output_index for row in rows), np.int64, num_rows)
        self._step += 1
        # First of all, so that no other row of the step takes over these slots.
        self._last_used[slots[slots >= 0]] = self._step
        new = {}
        for i in np.flatnonzero(slots < 0).tolist():
            slots[i] = self._take_slot(rows[i].request)
            new[int(slots[i])] = rows[i]
        if new:
            self._write(new)
        return PlacedRows(rows, slots, indices, self._params[slots])

    def adjust(self, logits: Tensor, placed: PlacedRows, input_ids: Tensor) -> None:
        """Apply penalties, bias and bans of each row to ``[num_rows, vocab]``, float32, in place.

        ``input_ids``: see ``Penalties.apply``.
        """
        self._penalties.apply(logits, placed, input_ids)
        self._rules.apply(logits, placed)

    def _find(self, request: Request) -> int:
        """Return the slot that has the state of ``request``, or -1."""
        slot = self._slots.get(request.id, -1)
        owner = self._owners[slot] if slot >= 0 else None
        # Another request may have had the id.
        return slot if owner is not None and owner[1] is request.sampling else -1

    def _take_slot(self, request: Request) -> int:
        slot = self._find(request)
        if slot >= 0:  # an earlier row of this step is of the same request
            return slot
        slot = int(self._last_used.argmin())
        if self._last_used[slot] == self._step:
            raise ValueError(f"a step has more rows than the {len(self._owners)} sampling slots")
        owner = self._owners[slot]
        if owner is not None and self._slots.get(owner[0]) == slot:
            del self._slots[owner[0]]
        self._slots[request.id] = slot
        self._owners[slot] = (request.id, request.sampling)
        self._last_used[slot] = self._step
        return slot

    def _write(self, new: dict[int, SampleRow]) -> None:
        """Write the state of requests, by slot."""
        cells = {}
        for slot, row in new.items():
            sampling = row.request.sampling
            cells[slot] = self._rules.make_cells(sampling, row.end_token_ids)
            self._params[slot] = encode_params(sampling, len(cells[slot]))
        self._penalties.forget(list(new))
        self._rules.write({slot: some for slot, some in cells.items() if len(some)})
