"""Rotary position embedding (RoPE, arXiv:2104.09864): the angles that rotate queries and keys.

Each formula is that of ``transformers``, evaluated in float32 in the same order.

*Dynamic* scaling makes the frequencies depend on a length. In transformers that length is the
longest position of a forward pass, and cached keys keep the rotation they got, so a key depends on
how its prompt was split into passes. Here a token at position ``p`` is always rotated like the last
token of a sequence of ``p + 1`` tokens. A cached key then depends on its prefix alone, not on
chunks, batches or recomputation. This equals transformers when it reads token by token. It also
equals its ``generate`` for every prompt within the pretraining context, however long the output
gets, because nothing is scaled up to there.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from serve.model_config.rope import RopeConfig


class RotaryEmbedding:
    """Cosines and sines of the rotation angles. It has no weights in a checkpoint."""

    def __init__(self, rope: RopeConfig | None, head_dim: int, device: torch.device | str) -> None:
        """``rope`` None: every angle is zero, so queries and keys stay as they are."""
        dim = head_dim if rope is None else rope.rotary_dim or head_dim
        self._rope = rope
        self._frequencies, self._scale = torch.zeros(dim // 2, device=device), 1.0
        if rope is not None:
            frequencies, self._scale = rope_frequencies(rope, dim)
            self._frequencies = frequencies.to(device)  # [rotary_dim / 2], radians per position
        self._exponents = _exponents(dim).to(device)

    def __call__(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Return cosine and sine at ``positions`` (``[num_tokens]``), for ``ops.rope_write``.

        Both are ``[num_tokens, rotary_dim / 2]``, float32.
        """
        if self._rope is not None and self._rope.type == "dynamic":
            frequencies = self._dynamic_frequencies(self._rope, positions)
        else:
            frequencies = self._frequencies
        # Positions are rounded to float32 first, as in transformers.
        angles = positions[:, None] * frequencies  # [num_tokens, rotary_dim / 2]
        cos, sin = angles.cos(), angles.sin()
        return (cos, sin) if self._scale == 1.0 else (cos * self._scale, sin * self._scale)

    def _dynamic_frequencies(self, rope: RopeConfig, positions: Tensor) -> Tensor:
        """Return ``[num_tokens, rotary_dim / 2]``: beyond pretraining the base grows."""
        head_dim = 2 * len(self._exponents)
        length = (positions + 1).clamp(min=rope.original_max_position_embeddings)
        growth = (rope.factor * length / rope.original_max_position_embeddings) - (rope.factor - 1)
        bases = rope.theta * growth ** (head_dim / (head_dim - 2))
        scaled = 1.0 / (bases[:, None] ** self._exponents)
        within = positions < rope.original_max_position_embeddings
        return torch.where(within[:, None], self._frequencies, scaled)


def rope_frequencies(rope: RopeConfig, head_dim: int) -> tuple[Tensor, float]:
    """Return frequencies ``[head_dim / 2]`` (float32, CPU) and the factor on cosine and sine.

    Frequencies are in radians per position. For dynamic scaling they are those within the
    pretraining context. Raises ``ValueError`` for an unknown type.
    """
    plain = 1.0 / (rope.theta ** _exponents(head_dim))
    match rope.type:
        case "default" | "dynamic":
            if rope.frequency_factors:
                return plain / torch.tensor(rope.frequency_factors), 1.0
            return plain, 1.0
        case "linear":
            return plain / rope.factor, 1.0
        case "llama3":
            return _llama3(rope, plain), 1.0
        case "yarn":
            return _yarn(rope, head_dim), _yarn_scale(rope)
        case "longrope":
            factors = rope.long_factors if rope.is_long else rope.frequency_factors
            divisors = torch.tensor(factors, dtype=torch.float32)
            # As in transformers: multiply first, then take the reciprocal.
            powers = rope.theta ** _exponents(head_dim)
            return 1.0 / (divisors * powers), _longrope_scale(rope)
    raise ValueError(f"rope type {rope.type!r} is not supported")


def _exponents(head_dim: int) -> Tensor:
    return torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim


def _llama3(rope: RopeConfig, plain: Tensor) -> Tensor:
    """Scale Llama 3: stretch long wavelengths, keep short ones, blend those in between."""
    original = rope.original_max_position_embeddings
    low, high = rope.low_freq_factor, rope.high_freq_factor
    wavelengths = 2 * math.pi / plain
    long = wavelengths > original / low
    short = wavelengths < original / high
    weight = (original / wavelengths - low) / (high - low)  # of the unscaled frequency
    blended = (1 - weight) * plain / rope.factor + weight * plain
    return torch.where(long, plain / rope.factor, torch.where(short, plain, blended))


def _yarn(rope: RopeConfig, head_dim: int) -> Tensor:
    """Scale by YaRN's "NTK-by-parts" (arXiv:2309.00071).

    Dimensions that rotate often within the pretraining context keep their frequency; those that
    rotate less than once or so are stretched by the factor; a linear ramp lies between.
    """

    def dimension(num_rotations: float) -> float:
        """Return the dimension that rotates ``num_rotations`` times within pretraining."""
        turns = rope.original_max_position_embeddings / (num_rotations * 2 * math.pi)
        return (head_dim * math.log(turns)) / (2 * math.log(rope.theta))

    low, high = dimension(rope.beta_fast), dimension(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    width = 0.001 if low == high else high - low
    stretched = ((torch.arange(head_dim // 2, dtype=torch.float32) - low) / width).clamp(0, 1)
    kept = 1 - stretched  # [head_dim / 2], weight of the unscaled frequency
    powers = rope.theta ** _exponents(head_dim)
    return 1.0 / (rope.factor * powers) * (1 - kept) + 1.0 / powers * kept


def _longrope_scale(rope: RopeConfig) -> float:
    """Return LongRoPE's factor on cosine and sine (arXiv:2402.13753), or the checkpoint's own."""
    if rope.attention_factor is not None:
        return rope.attention_factor
    if rope.factor <= 1:
        return 1.0
    return math.sqrt(1 + math.log(rope.factor) / math.log(rope.original_max_position_embeddings))


def _yarn_scale(rope: RopeConfig) -> float:
    """Return YaRN's attention temperature as a factor on cosine and sine."""

    def scale(weight: float) -> float:
        return 1.0 if rope.factor <= 1 else 0.1 * weight * math.log(rope.factor) + 1.0

    if rope.attention_factor is not None:
        return rope.attention_factor
    if rope.mscale and rope.mscale_all_dim:
        return scale(rope.mscale) / scale(rope.mscale_all_dim)
    return scale(1.0)
