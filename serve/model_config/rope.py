"""RopeConfig: how positions rotate queries and keys, read from both forms of config.json."""

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
    | {"finetuned"}  # says how the checkpoint was made; has no effect on inference
)


@dataclass(frozen=True, slots=True)
class RopeConfig:
    """Parameters of rotary position embedding (RoPE, arXiv:2104.09864) and its context scaling."""

    theta: float
    type: str = "default"  # default, linear, dynamic, llama3, yarn, longrope
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position_embeddings: int = 0  # context length of pretraining
    attention_factor: float | None = None
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True
    # Divisors, one per frequency: GGUF's rope_freqs, or LongRoPE's short factors, which apply
    # up to the context length of pretraining.
    frequency_factors: tuple[float, ...] = ()
    long_factors: tuple[float, ...] = ()  # LongRoPE's divisors for longer contexts
    is_long: bool = False  # the served context is long: then even short prompts use long_factors
    rotary_dim: int = 0  # leading dimensions of a head that are rotated; 0: all


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
    """Read the rotation; return it with the number of positions that the scaled model can serve.

    config.json has the parameters either in ``rope_parameters`` or in ``rope_scaling`` beside
    ``rope_theta``; ``parameters`` replaces both. ``theta`` is the family's default base, ``types``
    are the scaling types it supports, and ``partial`` tells whether it may rotate part of a head.
    Raises ``ValueError`` for an unknown key or type, because ignoring it would change the output.
    """
    if parameters is None:
        parameters = fields.get("rope_scaling") or fields.get("rope_parameters", {})
    scaling, rope_type = _check(parameters, types)
    rotary_dim = _rotary_dim(fields, scaling, head_dim, partial)
    theta = scaling.number("rope_theta", fields.number("rope_theta", theta))
    original = _original_positions(fields, scaling, max_positions)
    factors = scaling.numbers("frequency_factors")
    if factors and (rope_type != "default" or len(factors) != head_dim // 2):
        raise ValueError(
            f"rope type {rope_type} with {len(factors)} frequency factors is not supported; "
            f"supported: type default with {head_dim // 2}, half of head_dim"
        )
    match rope_type:
        case "default":
            rope = RopeConfig(theta, frequency_factors=factors, rotary_dim=rotary_dim)
            return rope, max_positions
        case "linear" | "dynamic":
            # For these types max_position_embeddings is the context of pretraining.
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


def _check(parameters: Any, types: tuple[str, ...]) -> tuple[Fields, str]:
    """Return the parameters and their type, if every key and the type are known."""
    if not isinstance(parameters, Mapping) or set(parameters) - _KEYS:
        is_map = isinstance(parameters, Mapping)
        unknown = sorted(set(parameters) - _KEYS) if is_map else parameters
        raise ValueError(f"rope parameters {unknown} are not supported")
    scaling = Fields(parameters)
    rope_type = scaling.get("rope_type", scaling.get("type", "default"))
    if rope_type not in types:
        supported = ", ".join(types)
        raise ValueError(f"rope type {rope_type!r} is not supported; supported: {supported}")
    return scaling, rope_type


def _rotary_dim(fields: Fields, scaling: Fields, head_dim: int, partial: bool) -> int:
    """Return how many dimensions of a head are rotated; 0 stands for all."""
    key = "partial_rotary_factor"
    if not partial:
        for holder in (scaling, fields):
            holder.only(key, 1.0)
        return 0
    size = int(head_dim * scaling.number(key, fields.number(key, 1.0)))
    if size % 2 or not 0 < size <= head_dim:
        raise ValueError(f"{key} leaves {size} of {head_dim} dimensions to rotate")
    return 0 if size == head_dim else size


def _original_positions(fields: Fields, scaling: Fields, max_positions: int) -> int:
    """Return the context of pretraining; a top-level value wins over one in ``scaling``."""
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
            f"each must have {size // 2}"
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
