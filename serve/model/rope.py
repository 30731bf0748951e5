"""Rotary embedding: from positions to the angles that turn queries and keys.

Each formula is the one of ``transformers``, evaluated in float32 in the same order.

*Dynamic* scaling makes the frequencies depend on a length. There, one forward pass uses the longest
position in it, and keys already cached keep the rotation they got; so a key's rotation depends on
how its prompt was cut into passes. Here a token at position ``p`` is always turned as the last one
of a sequence of ``p + 1`` tokens: a cached key depends on nothing but its prefix, whatever the
chunks, the batch or a recomputation. It is what ``transformers`` does when it reads token by token,
and what its ``generate`` does for every prompt within the context of the pretraining (up to there
nothing is scaled), however far the output grows beyond.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from serve.model_config.rope import RopeConfig


class RotaryEmbedding:
    """The angles for one model; nothing of it is in a checkpoint."""

    def __init__(self, rope: RopeConfig | None, head_dim: int, device: torch.device | str) -> None:
        """Without ``rope`` every angle is zero: nothing turns."""
        dim = head_dim if rope is None else rope.rotary_dim or head_dim
        self._rope = rope
        self._frequencies, self._scale = torch.zeros(dim // 2, device=device), 1.0
        if rope is not None:
            frequencies, self._scale = rope_frequencies(rope, dim)
            self._frequencies = frequencies.to(device)  # [rotary_dim / 2], radians per position
        self._exponents = _exponents(dim).to(device)

    def __call__(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Cosine and sine of ``positions`` (``[num_tokens]``): ``[num_tokens, rotary_dim / 2]``.

        Float32; for ``serve.model.kernels.ops.rope_write``.
        """
        if self._rope is not None and self._rope.type == "dynamic":
            frequencies = self._dynamic_frequencies(self._rope, positions)
        else:
            frequencies = self._frequencies
        angles = positions[:, None] * frequencies  # positions rounded to float32 first
        cos, sin = angles.cos(), angles.sin()
        return (cos, sin) if self._scale == 1.0 else (cos * self._scale, sin * self._scale)

    def _dynamic_frequencies(self, rope: RopeConfig, positions: Tensor) -> Tensor:
        """``[num_tokens, head_dim / 2]``: beyond the original context the base grows."""
        head_dim = 2 * len(self._exponents)
        length = (positions + 1).clamp(min=rope.original_max_position_embeddings)
        growth = (rope.factor * length / rope.original_max_position_embeddings) - (rope.factor - 1)
        bases = rope.theta * growth ** (head_dim / (head_dim - 2))
        scaled = 1.0 / (bases[:, None] ** self._exponents)
        within = positions < rope.original_max_position_embeddings
        return torch.where(within[:, None], self._frequencies, scaled)


def rope_frequencies(rope: RopeConfig, head_dim: int) -> tuple[Tensor, float]:
    """Frequencies ``[head_dim / 2]`` (float32, CPU) and the factor on cosine and sine.

    For dynamic scaling these are the ones within the original context.
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
            # The order of transformers: the factors before the reciprocal.
            powers = rope.theta ** _exponents(head_dim)
            return 1.0 / (divisors * powers), _longrope_scale(rope)
    raise ValueError(f"rope type {rope.type!r} is not supported")


def _exponents(head_dim: int) -> Tensor:
    return torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim


def _llama3(rope: RopeConfig, plain: Tensor) -> Tensor:
    """Long waves are stretched, short ones kept, those between blended."""
    original = rope.original_max_position_embeddings
    low, high = rope.low_freq_factor, rope.high_freq_factor
    wavelengths = 2 * math.pi / plain
    long = wavelengths > original / low
    short = wavelengths < original / high
    share = (original / wavelengths - low) / (high - low)  # of the unscaled frequency
    blended = (1 - share) * plain / rope.factor + share * plain
    return torch.where(long, plain / rope.factor, torch.where(short, plain, blended))


def _yarn(rope: RopeConfig, head_dim: int) -> Tensor:
    """Dimensions that turn often keep their frequency, those that hardly turn are stretched."""

    def dimension(num_rotations: float) -> float:
        """Where a wave turns ``num_rotations`` times within the original context."""
        turns = rope.original_max_position_embeddings / (num_rotations * 2 * math.pi)
        return (head_dim * math.log(turns)) / (2 * math.log(rope.theta))

    low, high = dimension(rope.beta_fast), dimension(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    width = 0.001 if low == high else high - low
    stretched = ((torch.arange(head_dim // 2, dtype=torch.float32) - low) / width).clamp(0, 1)
    kept = 1 - stretched
    powers = rope.theta ** _exponents(head_dim)
    return 1.0 / (rope.factor * powers) * (1 - kept) + 1.0 / powers * kept


def _longrope_scale(rope: RopeConfig) -> float:
    """As LongRoPE's paper suggests, unless the checkpoint says another."""
    if rope.attention_factor is not None:
        return rope.attention_factor
    if rope.factor <= 1:
        return 1.0
    return math.sqrt(1 + math.log(rope.factor) / math.log(rope.original_max_position_embeddings))


def _yarn_scale(rope: RopeConfig) -> float:
    """The correction of attention's temperature, as a factor on cosine and sine."""

    def scale(weight: float) -> float:
        return 1.0 if rope.factor <= 1 else 0.1 * weight * math.log(rope.factor) + 1.0

    if rope.attention_factor is not None:
        return rope.attention_factor
    if rope.mscale and rope.mscale_all_dim:
        return scale(rope.mscale) / scale(rope.mscale_all_dim)
    return scale(1.0)
