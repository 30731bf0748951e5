"""Whether a token is a request's last one, and what text it adds."""

from __future__ import annotations

from dataclasses import dataclass

from serve.replica.sequence import Sequence
from serve.request import FinishReason
from serve.tokenizer.detokenizer import Detokenizer


@dataclass(frozen=True, slots=True)
class StopCheck:
    """``text`` may be shown now; ``reason`` is set if the request ends with this token."""

    text: str
    reason: FinishReason | None = None
    stop: str | int | None = None


def check_stop(
    sequence: Sequence, output: Detokenizer, token_id: int, eos_token_ids: tuple[int, ...]
) -> StopCheck:
    """Feed the newest token to ``output`` and decide. Before ``min_tokens`` nothing but
    ``max_tokens`` ends a request; the text of a token that ends it by id is not shown.
    """
    sampling = sequence.request.sampling
    count = sequence.num_output_tokens
    if count > sampling.min_tokens:
        if token_id in sampling.stop_token_ids:
            return StopCheck(output.finish(), FinishReason.STOP, token_id)
        if token_id in eos_token_ids and not sampling.ignore_eos:
            return StopCheck(output.finish(), FinishReason.STOP)
    piece = output.push(token_id)
    if piece.stop is not None:
        return StopCheck(piece.text, FinishReason.STOP, piece.stop)
    if count >= sampling.max_tokens:
        return StopCheck(piece.text + output.finish(), FinishReason.LENGTH)
    return StopCheck(piece.text)
