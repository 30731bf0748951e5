"""Decide whether a token is a request's last one, and which text may be shown."""

from __future__ import annotations

from dataclasses import dataclass

from serve.replica.sequence import Sequence
from serve.request import FinishReason
from serve.tokenizer.detokenizer import Detokenizer


@dataclass(frozen=True, slots=True)
class StopCheck:
    """``text`` may be shown now. ``reason`` is set if the request ends with this token."""

    text: str
    reason: FinishReason | None = None
    stop: str | int | None = None  # the stop string or stop token id that ended the request


def check_stop(
    sequence: Sequence, detokenizer: Detokenizer, token_id: int, eos_token_ids: tuple[int, ...]
) -> StopCheck:
    """Detokenise the newest token of ``sequence`` and decide whether it is the last one.

    Before ``min_tokens`` only ``max_tokens`` ends a request. The text of an end token or a stop
    token is not shown.
    """
    sampling = sequence.request.sampling
    count = sequence.num_output_tokens
    if count > sampling.min_tokens:
        if token_id in sampling.stop_token_ids:
            return StopCheck(detokenizer.finish(), FinishReason.STOP, token_id)
        if token_id in eos_token_ids and not sampling.ignore_eos:
            return StopCheck(detokenizer.finish(), FinishReason.STOP)
    piece = detokenizer.push(token_id)
    if piece.stop is not None:
        return StopCheck(piece.text, FinishReason.STOP, piece.stop)
    if count >= sampling.max_tokens:
        return StopCheck(piece.text + detokenizer.finish(), FinishReason.LENGTH)
    return StopCheck(piece.text)
