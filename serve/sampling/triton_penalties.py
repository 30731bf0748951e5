"""Penalties as one kernel over counts and logits."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

_BLOCK = 2048


@triton.jit(
    do_not_specialize_on_alignment=[
        "row_ptr", "place_ptr", "added_ptr", "repetition_ptr", "frequency_ptr", "presence_ptr"
    ]
)  # fmt: skip
def _penalise_kernel(
    logits_ptr, counts_ptr, input_ptr, row_ptr, place_ptr, added_ptr,
    repetition_ptr, frequency_ptr, presence_ptr, vocab_size, BLOCK: tl.constexpr,
):  # fmt: skip
    entry = tl.program_id(0)
    row, place = tl.load(row_ptr + entry), tl.load(place_ptr + entry)
    token = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    valid = token < vocab_size
    is_input = valid & (token == tl.load(input_ptr + row))
    count = tl.load(counts_ptr + place * vocab_size + token, valid, 0)
    count += tl.where(is_input, tl.load(added_ptr + entry), 0)
    tl.store(counts_ptr + place * vocab_size + token, count, is_input)
    logit = tl.load(logits_ptr + row * vocab_size + token, valid, 0.0)
    num_outputs = count >> 1
    amount = num_outputs.to(tl.float32) * tl.load(frequency_ptr + entry)
    amount += tl.where(num_outputs > 0, tl.load(presence_ptr + entry), 0.0)
    factor = tl.load(repetition_ptr + entry)
    repeated = tl.where(logit > 0, tl.math.div_rn(logit, factor), logit * factor)
    logit = tl.where(count > 0, repeated, logit) - amount
    tl.store(logits_ptr + row * vocab_size + token, logit, valid)


def penalise(
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
    """Count the newest token of ``rows``, then penalise what they have had. In place.

    ``logits``: ``[num_logits, vocab_size]``, float32; ``counts``: ``[num_places, vocab_size]``,
    int32, twice the number of times in the output, plus one for a token of the prompt;
    ``input_ids``: ``[num_logits]``, int64. Of each row, ``[num_rows]``: its number in ``logits``
    and its place in ``counts`` (int64), what its newest token adds there (int32), and its penalties
    (float32).
    """
    vocab_size = logits.shape[1]
    grid = len(rows), triton.cdiv(vocab_size, _BLOCK)
    _penalise_kernel[grid](
        logits, counts, input_ids, rows, places, added, repetition, frequency, presence, vocab_size,
        BLOCK=_BLOCK, enable_fp_fusion=False,  # rounded as in the reference
    )  # fmt: skip
