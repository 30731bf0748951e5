"""The biases and bans of ``serve.sampling.token_rules`` as one Triton kernel over their cells."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from serve.sampling.ruled_rows import RuledRows

_BLOCK = 512


@triton.jit(
    do_not_specialize_on_alignment=["row_ptr", "slot_ptr", "num_cells_ptr", "are_banned_ptr"]
)
def _rules_kernel(
    logits_ptr, cells_ptr, row_ptr, slot_ptr, num_cells_ptr, are_banned_ptr,
    vocab_size, width, BLOCK: tl.constexpr,
):  # fmt: skip
    entry = tl.program_id(0)
    row, slot = tl.load(row_ptr + entry), tl.load(slot_ptr + entry)
    number = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    valid = number < tl.load(num_cells_ptr + entry)
    cell_ptr = cells_ptr + (slot * width + number) * 2
    code = tl.load(cell_ptr, valid, 0)
    bias = tl.load(cell_ptr + 1, valid, 0).to(tl.float32, bitcast=True)
    token = tl.where(code < 0, -1 - code, code)
    is_banned = (code < 0) & (tl.load(are_banned_ptr + entry) > 0)
    valid = valid & (token < vocab_size)
    logit_ptr = logits_ptr + row * vocab_size + token
    logit = tl.load(logit_ptr, valid, 0.0) + bias
    tl.store(logit_ptr, tl.where(is_banned, float("-inf"), logit), valid)


def apply_rules(logits: Tensor, cells: Tensor, ruled: RuledRows) -> None:
    """Add the biases of each ruled row to its logits, and write -inf where its bans hold. In place.

    ``logits``: ``[num_rows, vocab_size]``, contiguous, float32. ``cells``: ``[num_slots, width,
    2]``, int32, contiguous: a token id, or ``-1 - id`` if it is banned, and the bits of its bias.
    """
    grid = len(ruled.row_ids), triton.cdiv(ruled.max_num_cells, _BLOCK)
    _rules_kernel[grid](
        logits, cells, ruled.row_ids, ruled.slots, ruled.num_cells, ruled.are_banned,
        logits.shape[1], cells.shape[1], BLOCK=_BLOCK,
    )  # fmt: skip
