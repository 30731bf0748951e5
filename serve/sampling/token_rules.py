"""Logit biases and banned ids, as cells that stay on the device by slot.

A cell is two integers of 32 bits: a token id, and the bits of the float that is added to its logit.
The id of a token that is banned until ``min_tokens`` is stored as ``-1 - id``. No two cells of a
slot have the same id, so the cells can be applied in any order.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Set

import numpy as np
import torch
from torch import Tensor

from serve.device import columns_to_device, to_device
from serve.request import SamplingParams
from serve.sampling.parts import split
from serve.sampling.placed_rows import PlacedRows
from serve.sampling.ruled_rows import RuledRows

_MAX_CELLS = 1 << 20  # in one copy to the device: 8 MiB, for which warm_up has pinned memory
_WIDTH_STEP = 256


def _make_cells(bias: Mapping[int, float], bans: Set[int]) -> np.ndarray:
    ids = [*bias, *(bans - bias.keys())]
    cells = np.zeros((len(ids), 2), np.int32)
    cells[:, 0] = [-1 - token if token in bans else token for token in ids]
    cells[: len(bias), 1] = np.fromiter(bias.values(), np.float32, len(bias)).view(np.int32)
    return cells


class TokenRules:
    """The biases and bans of each slot.

    The memory grows with the longest list so far. ``warm_up`` uses the longest that a request may
    have, so it does not grow in service.
    """

    def __init__(self, num_slots: int, device: torch.device) -> None:
        # [num_slots, width, 2], int32; the cells of a slot beyond its own are undefined
        self._cells = torch.empty((num_slots, 0, 2), dtype=torch.int32, device=device)
        self._last_rules: tuple[object, ...] | None = None
        self._last_cells = np.empty((0, 2), np.int32)

    def make_cells(self, sampling: SamplingParams, end_token_ids: Sequence[int]) -> np.ndarray:
        """Return the cells of one request: ``[num_cells, 2]``, int32. They must not be changed.

        The choices of one call have equal rules, so they share what the first one makes.
        """
        has_bans = sampling.min_tokens > 0
        rules = sampling.logit_bias, has_bans, sampling.stop_token_ids, end_token_ids
        if rules != self._last_rules:
            bans = {*end_token_ids, *sampling.stop_token_ids} if has_bans else set()
            self._last_rules, self._last_cells = rules, _make_cells(sampling.logit_bias, bans)
        return self._last_cells

    def write(self, cells: Mapping[int, np.ndarray]) -> None:
        """Replace the cells of some slots."""
        self._widen(max((len(some) for some in cells.values()), default=0))
        for part in split(cells, len, _MAX_CELLS):
            moved = to_device(np.concatenate([*part.values()]), torch.int32, self._cells.device)
            of_slots = torch.split(moved, [len(some) for some in part.values()])
            for slot, some in zip(part, of_slots, strict=True):
                self._cells[slot, : len(some)].copy_(some)

    def _widen(self, width: int) -> None:
        num_slots, old_width, _ = self._cells.shape
        if width > old_width:
            rounded = -(-width // _WIDTH_STEP) * _WIDTH_STEP
            wider = self._cells.new_empty((num_slots, rounded, 2))
            wider[:, :old_width] = self._cells
            self._cells = wider

    def apply(self, logits: Tensor, placed: PlacedRows) -> None:
        """Add each row's biases, then set its banned ids to -inf. In place.

        ``logits``: ``[num_rows, vocab_size]``, float32.
        """
        index = placed.find_ruled()
        if not len(index):
            return
        ruled = _make_columns(index, placed, logits.device)
        if logits.is_cuda:
            from serve.sampling.triton_rules import apply_rules  # needs Triton, as GPUs do

            apply_rules(logits, self._cells, ruled)
        else:
            _apply_rules(logits, self._cells, ruled)


def _make_columns(index: np.ndarray, placed: PlacedRows, device: torch.device) -> RuledRows:
    num_cells = placed.params["num_cells"][index]
    columns = [
        torch.from_numpy(index),
        torch.from_numpy(placed.slots[index]),
        torch.from_numpy(num_cells),
        torch.from_numpy(placed.ban_ids()[index].astype(np.int32)),
    ]
    row_ids, slots, counts, are_banned = columns_to_device(columns, device)
    return RuledRows(row_ids, slots, counts, are_banned, int(num_cells.max()))


def _apply_rules(logits: Tensor, cells: Tensor, ruled: RuledRows) -> None:
    """Do what ``serve.sampling.triton_rules.apply_rules`` does, for all rows at once."""
    vocab_size = logits.shape[1]
    cells = cells[ruled.slots, : ruled.max_num_cells]  # [num_ruled, max_num_cells, 2]
    codes, bias = cells[..., 0], cells[..., 1].view(torch.float32)
    tokens = torch.where(codes < 0, -1 - codes, codes)
    is_banned = (codes < 0) & (ruled.are_banned[:, None] > 0)
    number = torch.arange(ruled.max_num_cells, device=cells.device)
    is_valid = (number < ruled.num_cells[:, None]) & (tokens < vocab_size)
    valid = is_valid.view(-1).nonzero()[:, 0]
    places = (ruled.row_ids[:, None] * vocab_size + tokens).view(-1)[valid]
    flat = logits.view(-1)
    changed = flat[places] + bias.reshape(-1)[valid]
    flat[places] = changed.masked_fill_(is_banned.view(-1)[valid], float("-inf"))
