"""Greedy and temperature sampling as two Triton kernels over the logits.

The kernels compute the same function of (logits, temperature, seed, output index) as
``serve.sampling.sampler``. They repeat its noise and its order of equal scores bit for bit. Nothing
waits for the host, so a CUDA graph can hold them.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_BLOCK = 2048
# splitmix64, as in serve.sampling.noise
_GOLDEN = tl.constexpr(0x9E3779B97F4A7C15)
_FACTOR_1 = tl.constexpr(0xBF58476D1CE4E5B9)
_FACTOR_2 = tl.constexpr(0x94D049BB133111EB)


@triton.jit
def _random_bits(stream, token):
    """Return 52 random bits (int64) for ``token`` in ``stream`` (uint64)."""
    bits = stream + (token + 1).to(tl.uint64) * _GOLDEN
    bits = (bits ^ (bits >> 30)) * _FACTOR_1
    bits = (bits ^ (bits >> 27)) * _FACTOR_2
    bits = bits ^ (bits >> 31)
    return (bits >> 12).to(tl.int64)


@triton.jit
def _gumbel(bits):
    """Turn 52 random bits into standard Gumbel noise, float64."""
    uniform = (bits.to(tl.float64) + 0.5) * 2.220446049250313e-16
    return -tl.log(-tl.log(uniform))


@triton.jit
def _rough_gumbel(bits):
    """Compute the same noise to about 1e-5, float32, in a tenth of the time.

    Where one minus the uniform number is small, rounding would lose it. The series of the logarithm
    is used there.
    """
    uniform = (bits.to(tl.float32) + 0.5) * 2.220446049250313e-16
    rest = ((0xFFFFFFFFFFFFF - bits).to(tl.float32) + 0.5) * 2.220446049250313e-16
    series = 1 / 4 + rest * (1 / 5 + rest * (1 / 6 + rest * (1 / 7)))
    series = rest * (1 + rest * (1 / 2 + rest * (1 / 3 + rest * series)))
    return -tl.log(tl.where(rest < 0.1, series, -tl.log(uniform)))


@triton.jit
def _first_highest(score, token, valid, vocab_size):
    """Return the highest score and its id: the smallest of equal ones, any id among NaNs."""
    best = tl.max(score, 0)
    return best, tl.min(tl.where(valid & (score == best), token, vocab_size), 0)


@triton.jit(do_not_specialize_on_alignment=["temperature_ptr", "stream_ptr"])
def _best_of_part(
    logits_ptr, temperature_ptr, stream_ptr, score_ptr, token_ptr,
    vocab_size, num_parts, BLOCK: tl.constexpr,
):  # fmt: skip
    row, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    token = part * BLOCK + tl.arange(0, BLOCK)
    valid = token < vocab_size
    logit = tl.load(logits_ptr + row * vocab_size + token, valid, float("-inf")).to(tl.float32)
    temperature = tl.load(temperature_ptr + row)
    if temperature > 0:
        stream = tl.load(stream_ptr + row).to(tl.uint64, bitcast=True)
        scaled = tl.math.div_rn(logit, temperature)
        bits = _random_bits(stream, token)
        rough = tl.where(valid, scaled + _rough_gumbel(bits), float("-inf"))
        highest = tl.max(rough, 0)
        near = valid & (rough >= highest - (1e-3 + 1e-5 * tl.abs(highest)))
        # Nearly always one token is near the highest, and only it needs the exact noise.
        if tl.sum(near.to(tl.int32), 0) == 1:
            found = tl.min(tl.where(near, token, vocab_size), 0)
            logit_found = tl.load(logits_ptr + row * vocab_size + found).to(tl.float32)
            exact = tl.math.div_rn(logit_found, temperature).to(tl.float64)
            best = exact + _gumbel(_random_bits(stream, found))
        else:
            score = tl.where(valid, scaled.to(tl.float64) + _gumbel(bits), float("-inf"))
            best, found = _first_highest(score, token, valid, vocab_size)
    else:
        best, found = _first_highest(logit.to(tl.float64), token, valid, vocab_size)
    tl.store(score_ptr + row * num_parts + part, best)
    tl.store(token_ptr + row * num_parts + part, found)


@triton.jit
def _best_of_parts(
    score_ptr, token_ptr, out_ptr, vocab_size, num_parts, PARTS: tl.constexpr
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    part = tl.arange(0, PARTS)
    valid = part < num_parts
    score = tl.load(score_ptr + row * num_parts + part, valid, float("-inf"))
    token = tl.load(token_ptr + row * num_parts + part, valid, vocab_size)
    _, found = _first_highest(score, token, valid, vocab_size)
    tl.store(out_ptr + row, tl.minimum(found, vocab_size - 1).to(tl.int64))


def sample_plain(logits: Tensor, temperature: Tensor, streams: Tensor, out: Tensor) -> None:
    """Write one token id for each row into ``out`` (``[num_rows]``, int64).

    ``logits``: ``[num_rows, vocab_size]``, contiguous, of any float type. ``temperature``:
    ``[num_rows]``, float32, 0 for greedy rows. ``streams``: ``[num_rows]``, int64, from
    ``serve.sampling.noise.noise_streams``.
    """
    num_rows, vocab_size = logits.shape
    num_parts = triton.cdiv(vocab_size, _BLOCK)
    scores = torch.empty((num_rows, num_parts), dtype=torch.float64, device=logits.device)
    tokens = torch.empty((num_rows, num_parts), dtype=torch.int32, device=logits.device)
    _best_of_part[(num_rows, num_parts)](
        logits, temperature, streams, scores, tokens, vocab_size, num_parts, BLOCK=_BLOCK
    )
    _best_of_parts[(num_rows,)](
        scores, tokens, out, vocab_size, num_parts, PARTS=triton.next_power_of_2(num_parts)
    )
