"""Check sampling fields that a caller gives in Python, and fill in the others."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import msgspec

from serve.config.sampling_defaults import RANGES, SamplingDefaults
from serve.request import SamplingParams

# Lowest and highest value of every number; the penalties as in the OpenAI API.
_RANGES = RANGES | {
    "max_tokens": (1, math.inf),
    "min_tokens": (0, math.inf),
    "seed": (-(2**63), 2**63 - 1),
    "presence_penalty": (-2.0, 2.0),
    "frequency_penalty": (-2.0, 2.0),
}
_ABOVE_ZERO = ("top_p", "repetition_penalty")
_MAX_BIAS = 100.0


def sampling_from_fields(
    fields: Mapping[str, Any], defaults: SamplingDefaults, vocab_size: int
) -> SamplingParams:
    """Return the parameters that ``fields`` (names of ``SamplingParams``) and ``defaults`` make.

    A field that is None has its default. ``stop`` may be a single string, and ``top_k`` -1 for off.
    Raises ``TypeError`` for an unknown field, and ``ValueError`` for a value that is out of range,
    of the wrong type, or missing (``max_tokens`` has no default). Both name the field.
    """
    for name in fields:
        if name not in SamplingParams.__struct_fields__:
            raise TypeError(f"{name!r} is not a field of SamplingParams")
    chosen = {name: value for name, value in fields.items() if value is not None}
    if isinstance(chosen.get("stop"), str):
        chosen["stop"] = (chosen["stop"],)
    for name, value in chosen.items():
        _check_type(name, value)
    if "max_tokens" not in chosen:
        raise ValueError("max_tokens must be given")
    params = msgspec.convert(asdict(defaults) | chosen, SamplingParams)
    _check_numbers(params)
    _check_tokens(params, vocab_size)
    if not all(params.stop):
        raise ValueError("stop must not have an empty string")
    return msgspec.structs.replace(params, top_k=min(max(0, params.top_k), vocab_size))


def _check_type(name: str, value: Any) -> None:
    """Check one field by itself, so that the error names it and not its place in a structure."""
    try:
        msgspec.convert({"max_tokens": 1, name: value}, SamplingParams)
    except msgspec.ValidationError as error:
        reason = str(error).partition(" - at ")[0]
        raise ValueError(f"{name}: {reason}, the value is {value!r}") from None


def _check_numbers(params: SamplingParams) -> None:
    for name, (low, high) in _RANGES.items():
        value = getattr(params, name)
        if not low <= value <= high or (value == 0 and name in _ABOVE_ZERO):
            bracket = "(" if name in _ABOVE_ZERO else "["
            raise ValueError(f"{name} must be in {bracket}{low}, {high}], got {value}")
    if params.min_tokens > params.max_tokens:
        raise ValueError(f"min_tokens must not exceed max_tokens, {params.max_tokens}")


def _check_tokens(params: SamplingParams, vocab_size: int) -> None:
    for name in ("logit_bias", "stop_token_ids"):
        for token_id in getattr(params, name):
            if not 0 <= token_id < vocab_size:
                raise ValueError(f"{name} must have token ids in [0, {vocab_size}), got {token_id}")
    for bias in params.logit_bias.values():
        if not -_MAX_BIAS <= bias <= _MAX_BIAS:
            raise ValueError(f"logit_bias must have values in [-100, 100], got {bias}")
