"""RopeConfig: how positions rotate queries and keys, as config.json says it in two forms."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from serve.model_config.fields import Fields

ROPE_TYPES = ("default", "linear", "dynamic", "llama3", "yarn")
_KEYS = (
    {"rope_type", "type", "rope_theta", "factor", "original_max_position_embeddings"}
    | {"low_freq_factor", "high_freq_factor", "frequency_factors", "partial_rotary_factor"}
    | {"attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate"}
    | {"short_factor", "long_factor"}
    | {"finetuned"}  # says how the checkpoint was made, nothing about how to run it
)


@dataclass(frozen=True, slots=True)
class RopeConfig:
    """How positions rotate queries and keys."""

    theta: float
    type: str = "default"  # default, linear, dynamic, llama3, yarn, longrope
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position_embeddings: int = 0  # context of the pretraining, before scaling
    attention_factor: float | None = None
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True
    # Divisors, one per frequency: GGUF's rope_freqs, and LongRoPE's for contexts within the
    # pretraining's.
    frequency_factors: tuple[float, ...] = ()
    long_factors: tuple[float, ...] = ()  # LongRoPE's for longer contexts
    is_long: bool = False  # the context that is served is one: its rotation is that of all prompts
    rotary_dim: int = 0  # how much of a head is rotated, from its beginning; 0: all


def read_rope(
    fields: Fields,
    max_positions: int,
    head_dim: int,
    *,
    theta: float = 10000.0,
    parameters: Mapping[str, Any] | None = None,
    types: tuple[str, ...] = ROPE_TYPES,
    partial: bool = False,
) -> tuple[RopeConfig, int]:
    """The rotation, and the number of positions it makes usable.

    Both forms are read: ``rope_parameters``, and ``rope_scaling`` beside ``rope_theta``; unless
    ``parameters`` are given. ``theta`` is what the family takes where nothing is said, ``types``
    what it knows, and ``partial`` whether it can rotate part of a head.
    """
    if parameters is None:
        parameters = fields.get("rope_scaling") or fields.get("rope_parameters", {})
    if not isinstance(parameters, Mapping) or set(parameters) - _KEYS:
        is_map = isinstance(parameters, Mapping)
        unknown = sorted(set(parameters) - _KEYS) if is_map else parameters
        raise ValueError(f"rope parameters {unknown} are not supported")
    scaling = Fields(parameters)
    rope_type = scaling.get("rope_type", scaling.get("type", "default"))
    if rope_type not in types:
        supported = ", ".join(types)
        raise ValueError(f"rope type {rope_type!r} is not supported; supported: {supported}")
    rotary_dim = _rotary_dim(fields, scaling, head_dim) if partial else _all_of_it(fields, scaling)
    theta = scaling.number("rope_theta", fields.number("rope_theta", theta))
    original = _original_positions(fields, scaling, max_positions)
    factors = scaling.numbers("frequency_factors")
    if factors and (rope_type != "default" or len(factors) != head_dim // 2):
        raise ValueError("rope frequency factors fit neither head_dim nor this rope type")
    match rope_type:
        case "default":
            rope = RopeConfig(theta, frequency_factors=factors, rotary_dim=rotary_dim)
            return rope, max_positions
        case "linear" | "dynamic":
            # Here max_position_embeddings is the context of the pretraining.
            factor = scaling.number("factor")
            rope = RopeConfig(
                theta, rope_type, factor, original_max_position_embeddings=max_positions
            )
            return rope, max(max_positions, int(max_positions * factor))
        case "llama3":
            return _llama3(scaling, theta, original), max_positions
        case "yarn":
            rope = _yarn(scaling, theta, original, max_positions)
            return rope, max(max_positions, int(original * rope.factor))
        case _:
            rope = _longrope(scaling, theta, original, max_positions, rotary_dim or head_dim)
            return replace(rope, rotary_dim=rotary_dim), max_positions


def _all_of_it(fields: Fields, scaling: Fields) -> int:
    for holder in (scaling, fields):
        value = holder.get("partial_rotary_factor")
        if value not in (None, 1, 1.0):
            raise ValueError(f"partial_rotary_factor {value} is not supported; supported: 1.0")
    return 0


def _rotary_dim(fields: Fields, scaling: Fields, head_dim: int) -> int:
    key = "partial_rotary_factor"
    size = int(head_dim * scaling.number(key, fields.number(key, 1.0)))
    if size % 2 or not 0 < size <= head_dim:
        raise ValueError(f"{key} leaves {size} of {head_dim} dimensions to rotate")
    return 0 if size == head_dim else size


def _original_positions(fields: Fields, scaling: Fields, max_positions: int) -> int:
    """The pretraining's context; a value beside the rope parameters outranks one in them."""
    key = "original_max_position_embeddings"
    holder = fields if fields.get(key) is not None else scaling
    return holder.count(key, max_positions)


def _llama3(scaling: Fields, theta: float, original: int) -> RopeConfig:
    low, high = scaling.number("low_freq_factor"), scaling.number("high_freq_factor")
    if high <= low:
        raise ValueError(f"rope high_freq_factor {high} is not above low_freq_factor {low}")
    return RopeConfig(theta, "llama3", scaling.number("factor"), low, high, original)


def _yarn(scaling: Fields, theta: float, original: int, max_positions: int) -> RopeConfig:
    return RopeConfig(
        theta,
        "yarn",
        scaling.number("factor", max_positions / original),
        original_max_position_embeddings=original,
        attention_factor=scaling.optional_number("attention_factor"),
        beta_fast=scaling.number("beta_fast", 32.0),
        beta_slow=scaling.number("beta_slow", 1.0),
        mscale=scaling.optional_number("mscale"),
        mscale_all_dim=scaling.optional_number("mscale_all_dim"),
        truncate=scaling.flag("truncate", True),
    )


def _longrope(
    scaling: Fields, theta: float, original: int, max_positions: int, size: int
) -> RopeConfig:
    short, long = scaling.numbers("short_factor"), scaling.numbers("long_factor")
    if len(short) != size // 2 or len(long) != size // 2:
        raise ValueError(
            f"rope short_factor and long_factor have {len(short)} and {len(long)} numbers; "
            f"{size // 2} are wanted"
        )
    return RopeConfig(
        theta,
        "longrope",
        scaling.number("factor", max_positions / original),
        original_max_position_embeddings=original,
        attention_factor=scaling.optional_number("attention_factor"),
        frequency_factors=short,
        long_factors=long,
        is_long=max_positions > original,
    )
