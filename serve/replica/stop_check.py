"""Decide whether a token is a request's last one, and which text may be shown."""

from __future__ import annotations

from dataclasses import dataclass

from serve.model_config.config import ModelConfig
from serve.replica.sequence import Sequence
from serve.request import FinishReason, SamplingParams
from serve.tokenizer.detokenizer import Detokenizer
from serve.tokenizer.tokenizer import Tokenizer


def find_eos_token_ids(model: ModelConfig, tokenizer: Tokenizer | None) -> tuple[int, ...]:
    """Return the end tokens of the model and of its tokenizer, those that the model can sample.

    Fine-tunes on a chat template often name its end token only in the tokenizer's configuration.
    """
    ids = dict.fromkeys(model.eos_token_ids)
    if tokenizer is not None and tokenizer.eos_token_id is not None:
        ids[tokenizer.eos_token_id] = None
    return tuple(token_id for token_id in ids if token_id < model.vocab_size)


@dataclass(frozen=True, slots=True)
class EndTokens:
    """The token ids that end one request. Sets, because every sampled token is looked up."""

    stop: frozenset[int]  # asked for by the request
    eos: frozenset[int]  # the model's own; empty if the request ignores them


def end_tokens(sampling: SamplingParams, eos_token_ids: frozenset[int]) -> EndTokens:
    """Return the end tokens of a request to a model that has ``eos_token_ids``."""
    eos = frozenset[int]() if sampling.ignore_eos else eos_token_ids
    return EndTokens(frozenset(sampling.stop_token_ids), eos)


@dataclass(frozen=True, slots=True)
class StopCheck:
    """``text`` may be shown now. ``reason`` is set if the request ends with this token."""

    text: str
    reason: FinishReason | None = None
    stop: str | int | None = None  # the stop string or stop token id that ended the request


def check_stop(
    sequence: Sequence, detokenizer: Detokenizer, token_id: int, ends: EndTokens
) -> StopCheck:
    """Detokenise the newest token of ``sequence`` and decide whether it is the last one.

    Before ``min_tokens`` only ``max_tokens`` ends a request. The text of an end token or a stop
    token is shown if the request includes stop strings in its output.
    """
    sampling = sequence.request.sampling
    count = sequence.num_output_tokens
    if count > sampling.min_tokens:
        if token_id in ends.stop:
            return _check_end_token(sampling, detokenizer, token_id, token_id)
        if token_id in ends.eos:
            return _check_end_token(sampling, detokenizer, token_id, None)
    piece = detokenizer.push(token_id)
    if piece.stop is not None:
        return StopCheck(piece.text, FinishReason.STOP, piece.stop)
    if count >= sampling.max_tokens:
        return StopCheck(piece.text + detokenizer.finish(), FinishReason.LENGTH)
    return StopCheck(piece.text)


def _check_end_token(
    sampling: SamplingParams, detokenizer: Detokenizer, token_id: int, stop: int | None
) -> StopCheck:
    if not sampling.include_stop_str_in_output:
        return StopCheck(detokenizer.finish(), FinishReason.STOP, stop)
    piece = detokenizer.push(token_id)
    if piece.stop is not None:  # the token's text completes a stop string, which ends the text
        return StopCheck(piece.text, FinishReason.STOP, piece.stop)
    return StopCheck(piece.text + detokenizer.finish(), FinishReason.STOP, stop)
