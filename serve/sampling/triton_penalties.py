"""The penalties of ``serve.sampling.penalties`` as one Triton kernel over counts and logits."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from serve.sampling.penalised_rows import PenalisedRows

_BLOCK = 2048


@triton.jit(
    do_not_specialize_on_alignment=[
        "row_ptr", "slot_ptr", "increment_ptr", "repetition_ptr", "frequency_ptr", "presence_ptr"
    ]
)  # fmt: skip
def _penalise_kernel(
    logits_ptr, counts_ptr, input_ptr, row_ptr, slot_ptr, increment_ptr,
    repetition_ptr, frequency_ptr, presence_ptr, vocab_size, BLOCK: tl.constexpr,
):  # fmt: skip
    entry = tl.program_id(0)
    row, slot = tl.load(row_ptr + entry), tl.load(slot_ptr + entry)
    token = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    valid = token < vocab_size
    is_input = valid & (token == tl.load(input_ptr + row))
    count = tl.load(counts_ptr + slot * vocab_size + token, valid, 0)
    count += tl.where(is_input, tl.load(increment_ptr + entry), 0)
    tl.store(counts_ptr + slot * vocab_size + token, count, is_input)
    logit = tl.load(logits_ptr + row * vocab_size + token, valid, 0.0)
    num_outputs = count >> 1
    amount = num_outputs.to(tl.float32) * tl.load(frequency_ptr + entry)
    amount += tl.where(num_outputs > 0, tl.load(presence_ptr + entry), 0.0)
    factor = tl.load(repetition_ptr + entry)
    repeated = tl.where(logit > 0, tl.math.div_rn(logit, factor), logit * factor)
    logit = tl.where(count > 0, repeated, logit) - amount
    tl.store(logits_ptr + row * vocab_size + token, logit, valid)


def penalise(logits: Tensor, counts: Tensor, input_ids: Tensor, penalised: PenalisedRows) -> None:
    """Count the newest token of each penalised row, then penalise its tokens. In place.

    ``logits``: ``[num_rows, vocab_size]``, float32. ``counts``: ``[num_slots, vocab_size]``, int32,
    twice the number of times that a token is in the output, plus one if it is in the prompt.
    ``input_ids``: ``[num_rows]``, int64.
    """
    vocab_size = logits.shape[1]
    grid = len(penalised.row_ids), triton.cdiv(vocab_size, _BLOCK)
    _penalise_kernel[grid](
        logits, counts, input_ids,
        penalised.row_ids, penalised.slots, penalised.increments,
        penalised.repetition, penalised.frequency, penalised.presence, vocab_size,
        BLOCK=_BLOCK, enable_fp_fusion=False,  # rounded as in the reference
    )  # fmt: skip
