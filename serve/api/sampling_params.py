"""Make ``SamplingParams`` of a request's fields; check what depends on the model."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

from serve.api.schemas import SamplingFields
from serve.api.validation import InvalidField, shorten, to_struct
from serve.config.sampling_defaults import SamplingDefaults
from serve.request import SamplingParams

T = TypeVar("T")


def make_sampling_params(
    fields: SamplingFields,
    defaults: SamplingDefaults,
    *,
    max_tokens: int,
    vocab_size: int,
    has_tokenizer: bool,
) -> SamplingParams:
    """Make the parameters that all prompts and choices of a request share.

    ``max_tokens`` is the limit for requests without one of their own, to a model that recommends
    none. It is not yet cut to the room that a prompt leaves in the context. Raises
    ``InvalidField``.
    """
    limit = fields.max_completion_tokens or fields.max_tokens or defaults.max_tokens or max_tokens
    if fields.min_tokens > limit:
        raise InvalidField(f"min_tokens must not exceed max_tokens, {limit}", "min_tokens")
    stop = (fields.stop,) if isinstance(fields.stop, str) else tuple(fields.stop)
    if stop and not has_tokenizer:
        raise InvalidField("stop needs a tokenizer, and the server runs without one", "stop")
    _check_vocabulary("stop_token_ids", fields.stop_token_ids, vocab_size)
    _check_vocabulary("logit_bias", fields.logit_bias, vocab_size)
    return SamplingParams(
        max_tokens=limit,
        min_tokens=fields.min_tokens,
        temperature=_or(fields.temperature, defaults.temperature),
        top_p=_or(fields.top_p, defaults.top_p),
        top_k=min(max(0, _or(fields.top_k, defaults.top_k)), vocab_size),
        min_p=_or(fields.min_p, defaults.min_p),
        presence_penalty=fields.presence_penalty,
        frequency_penalty=fields.frequency_penalty,
        repetition_penalty=_or(fields.repetition_penalty, defaults.repetition_penalty),
        seed=_or(fields.seed, 0),
        stop=stop,
        stop_token_ids=tuple(fields.stop_token_ids),
        logit_bias=fields.logit_bias,
        include_stop_str_in_output=fields.include_stop_str_in_output,
        skip_special_tokens=fields.skip_special_tokens,
        ignore_eos=fields.ignore_eos,
    )


def sampling_from_keywords(
    keywords: Mapping[str, Any],
    defaults: SamplingDefaults,
    *,
    max_tokens: int,
    vocab_size: int,
    has_tokenizer: bool,
) -> SamplingParams:
    """Make parameters of Python keywords, which have the names and ranges of the HTTP API's fields.

    A keyword that is None has its default. Raises ``TypeError`` for an unknown keyword, and
    ``ValueError`` for a value that is out of range or of the wrong type. Both name the keyword.
    """
    for name, value in keywords.items():
        if name not in SamplingFields.__struct_fields__:
            raise TypeError(f"{name!r} is not a sampling parameter")
        if isinstance(value, float) and not math.isfinite(value):  # JSON has no such numbers
            raise ValueError(f"{name} must be a finite number")
    try:
        return make_sampling_params(
            to_struct(keywords, SamplingFields),
            defaults,
            max_tokens=max_tokens,
            vocab_size=vocab_size,
            has_tokenizer=has_tokenizer,
        )
    except InvalidField as error:
        raise ValueError(str(error)) from None


def _or(value: T | None, default: T) -> T:
    return default if value is None else value


def _check_vocabulary(name: str, token_ids: Iterable[int], vocab_size: int) -> None:
    for token_id in token_ids:
        if token_id >= vocab_size:
            raise InvalidField(
                f"{name} must have token ids below {vocab_size}, got {shorten(token_id)}", name
            )
