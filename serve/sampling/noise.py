"""Sampling noise as a hash of (seed, output index, token id), the same on every device."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor

_GOLDEN = 0x9E3779B97F4A7C15  # splitmix64: an odd step and a finaliser that mixes all bits
_FACTORS = (0xBF58476D1CE4E5B9, 0x94D049BB133111EB)
_SHIFTS = (30, 27, 31)


def noise_streams(seeds: ArrayLike, output_indices: ArrayLike) -> np.ndarray:
    """Return the start of each output position's noise: int64, for ``gumbel_noise``."""
    state = _mix(np.array(seeds, np.int64).view(np.uint64) + np.uint64(_GOLDEN))
    state += np.array(output_indices, np.uint64) * np.uint64(_GOLDEN)
    return _mix(state).view(np.int64)


def uniform_noise(streams: Tensor, num_ids: int) -> Tensor:
    """Return uniform noise in the open interval (0, 1): ``[num_streams, num_ids]``, float64.

    ``streams``: ``[num_streams]``, int64, from ``noise_streams``. The noise is bit for bit the same
    on every device, because integer arithmetic wraps everywhere and the conversion is exact.
    """
    steps = torch.arange(1, num_ids + 1, device=streams.device).mul_(_signed(_GOLDEN))
    bits = streams[:, None] + steps  # [num_streams, num_ids]
    for shift, factor in zip(_SHIFTS[:2], _FACTORS, strict=True):
        bits.bitwise_xor_(_shift_right(bits, shift)).mul_(_signed(factor))
    bits.bitwise_xor_(_shift_right(bits, _SHIFTS[2]))
    # A number of 52 bits plus a half is exact as a double, so the result is never 0 or 1.
    return _shift_right(bits, 12).double().add_(0.5).mul_(2.0**-52)


def gumbel_noise(streams: Tensor, num_ids: int) -> Tensor:
    """Return standard Gumbel noise of ids ``[0, num_ids)``: ``[num_streams, num_ids]``, float64."""
    return uniform_noise(streams, num_ids).log_().neg_().log_().neg_()


def _shift_right(bits: Tensor, count: int) -> Tensor:
    """Shift logically, because torch's own shift of int64 repeats the sign bit."""
    return (bits >> count).bitwise_and_((1 << (64 - count)) - 1)


def _mix(values: np.ndarray) -> np.ndarray:
    """Apply the finaliser of splitmix64. Arithmetic on uint64 wraps."""
    for shift, factor in zip(_SHIFTS[:2], _FACTORS, strict=True):
        values = (values ^ (values >> np.uint64(shift))) * np.uint64(factor)
    mixed: np.ndarray = values ^ (values >> np.uint64(_SHIFTS[2]))
    return mixed


def _signed(value: int) -> int:
    """Return the int64 with the bits of ``value`` in ``[0, 2**64)``."""
    return value - (1 << 64) if value >> 63 else value
