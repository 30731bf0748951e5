"""Which tokens of a row min_p, top_k and top_p leave, found on a GPU without sorting the row.

Each filter keeps the logits above some value of the row and, of those equal to it, the first few
ids. That value is the largest from which on the row weighs at least a goal: the count ``top_k``, or
``top_p`` of the probability. It is found by bisection: passes over the whole row, which lies in the
L2 cache, until what is between the bounds fits into registers, and the rest there.

One program per row; nothing depends on the host, and no sum on the order in which threads run. A
loop ends when its bounds meet, and every second step halves the number of floats between them, so
that no input, NaN included, takes more than some 64 passes; a usual one takes a few.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_BLOCK = 8192  # elements one program holds in registers
_NUM_WARPS = 16


@triton.jit
def _load(row_ptr, start, vocab_size, BLOCK: tl.constexpr):
    """A block of the row. What is no number, or not there, counts as ruled out."""
    at = start + tl.arange(0, BLOCK)
    x = tl.load(row_ptr + at, at < vocab_size, float("-inf"))
    return tl.where(x == x, x, float("-inf"))


@triton.jit
def _mass(x, best):
    """Probability over that of the row's largest logit, float64."""
    return tl.exp(x.to(tl.float64) - best.to(tl.float64))


@triton.jit
def _largest(row_ptr, vocab_size, BLOCK: tl.constexpr):
    best = tl.full((BLOCK,), float("-inf"), tl.float32)
    for start in range(0, vocab_size, BLOCK):
        best = tl.maximum(best, _load(row_ptr, start, vocab_size, BLOCK))
    return tl.max(best, 0)


@triton.jit
def _survey(row_ptr, vocab_size, floor, best, MASS: tl.constexpr, BLOCK: tl.constexpr):
    """Of the logits above ``floor``: count, mass if wanted, smallest; and how many equal it."""
    above = tl.zeros((BLOCK,), tl.int32)
    equal = tl.zeros((BLOCK,), tl.int32)
    mass = tl.zeros((BLOCK,), tl.float64)
    low = tl.full((BLOCK,), float("inf"), tl.float32)
    for start in range(0, vocab_size, BLOCK):
        x = _load(row_ptr, start, vocab_size, BLOCK)
        is_above = x > floor
        above += is_above.to(tl.int32)
        equal += (x == floor).to(tl.int32)
        low = tl.minimum(low, tl.where(is_above, x, float("inf")))
        if MASS:
            mass += tl.where(is_above, _mass(x, best), 0.0)
    return tl.sum(above, 0), tl.sum(mass, 0), tl.min(low, 0), tl.sum(equal, 0)


@triton.jit
def _weigh(row_ptr, vocab_size, low, high, best, MASS: tl.constexpr, BLOCK: tl.constexpr):
    """Count and weight (mass or count, float64) of the logits in ``[low, high]``."""
    count = tl.zeros((BLOCK,), tl.int32)
    mass = tl.zeros((BLOCK,), tl.float64)
    for start in range(0, vocab_size, BLOCK):
        x = _load(row_ptr, start, vocab_size, BLOCK)
        inside = (x >= low) & (x <= high)
        count += inside.to(tl.int32)
        if MASS:
            mass += tl.where(inside, _mass(x, best), 0.0)
    num_inside = tl.sum(count, 0)
    weight = num_inside.to(tl.float64)
    if MASS:
        weight = tl.sum(mass, 0)
    return num_inside, weight


@triton.jit
def _to_order(x):
    """The int32 that orders floats as their values do; both zeros are 0."""
    bits = x.to(tl.int32, bitcast=True)
    return tl.where(bits < 0, -(bits & 0x7FFFFFFF), bits)


@triton.jit
def _from_order(order):
    size = tl.abs(order).to(tl.float32, bitcast=True)
    return tl.where(order < 0, -size, size)


@triton.jit
def _between(low, high, by_value):
    """A float in ``(low, high]``: halfway by value, or with as many floats on either side."""
    first, last = _to_order(low), _to_order(high)
    # The sum of both could overflow.
    middle = _from_order((first & last) + ((first ^ last) >> 1) + 1)
    mean = low * 0.5 + high * 0.5
    return tl.where((by_value > 0) & (mean > low) & (mean <= high), mean, middle)


@triton.jit
def _gather(row_ptr, scratch_ptr, vocab_size, low, high, BLOCK: tl.constexpr):
    """The logits in ``[low, high]``, at most ``BLOCK``, in the order of their ids; then -inf."""
    tl.debug_barrier()  # no thread reads what an earlier call left there
    filled = tl.full((), 0, tl.int32)
    for start in range(0, vocab_size, BLOCK):
        x = _load(row_ptr, start, vocab_size, BLOCK)
        wanted = (x >= low) & (x <= high)
        upto = tl.cumsum(wanted.to(tl.int32), 0)
        tl.store(scratch_ptr + filled + upto - 1, x, wanted)
        filled += tl.sum(wanted.to(tl.int32), 0)
    tl.debug_barrier()  # each thread reads what others wrote
    at = tl.arange(0, BLOCK)
    return tl.load(scratch_ptr + at, at < filled, float("-inf"))


@triton.jit
def _search(
    row_ptr, scratch_ptr, vocab_size, best, low, inside, goal,
    MASS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The largest value such that the logits from it on weigh at least ``goal``.

    ``inside`` logits lie in ``[low, best]`` and weigh that much. Returns the value, and the weight
    of the logits above it.
    """
    high = best
    base = tl.full((), 0.0, tl.float64)  # weight of the logits above high
    by_value = tl.full((), 1, tl.int32)
    while (inside > BLOCK) & (low < high):
        pivot = _between(low, high, by_value)
        count, weight = _weigh(row_ptr, vocab_size, pivot, high, best, MASS, BLOCK)
        enough = base + weight >= goal
        low = tl.where(enough, pivot, low)
        high = tl.where(enough, high, _from_order(_to_order(pivot) - 1))
        base = tl.where(enough, base, base + weight)
        inside = tl.where(enough, count, inside - count)
        by_value = 1 - by_value
    if low < high:
        x = _gather(row_ptr, scratch_ptr, vocab_size, low, high, BLOCK)
        weights = tl.full((BLOCK,), 1.0, tl.float64)
        if MASS:
            weights = _mass(x, best)
        while low < high:
            pivot = _between(low, high, 0)
            enough = base + tl.sum(tl.where(x >= pivot, weights, 0.0), 0) >= goal
            low = tl.where(enough, pivot, low)
            high = tl.where(enough, high, _from_order(_to_order(pivot) - 1))
        base += tl.sum(tl.where(x > low, weights, 0.0), 0)
    return low, base


@triton.jit
def _rule_out(row_ptr, vocab_size, floor, num_equal, BLOCK: tl.constexpr):
    """Keep the logits above ``floor`` and the first ``num_equal`` of those equal to it."""
    seen = tl.full((), 0, tl.int32)
    for start in range(0, vocab_size, BLOCK):
        x = _load(row_ptr, start, vocab_size, BLOCK)
        equal = (x == floor).to(tl.int32)
        upto = seen + tl.cumsum(equal, 0)
        kept = (x > floor) | ((x == floor) & (upto <= num_equal))
        at = start + tl.arange(0, BLOCK)
        tl.store(row_ptr + at, tl.where(kept, x, float("-inf")), at < vocab_size)
        seen += tl.sum(equal, 0)


# Compiled once, whatever the batch: its parameters lie anywhere in the buffer that brought them.
@triton.jit(do_not_specialize_on_alignment=["log_min_p_ptr", "top_k_ptr", "top_p_ptr"])
def _filter_kernel(
    logits_ptr, scratch_ptr, log_min_p_ptr, top_k_ptr, top_p_ptr, vocab_size, BLOCK: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    row_ptr = logits_ptr + row * vocab_size
    scratch_ptr += row * BLOCK
    log_min_p = tl.load(log_min_p_ptr + row)
    top_k = tl.load(top_k_ptr + row)
    top_p = tl.load(top_p_ptr + row)
    if (log_min_p > float("-inf")) | (top_k < vocab_size) | (top_p < 1):
        best = _largest(row_ptr, vocab_size, BLOCK)
        # What is left: the logits above floor, and the first num_equal of those equal to it.
        floor = tl.where(log_min_p > float("-inf"), best + log_min_p, float("-inf"))
        num_equal = tl.full((), 0, tl.int32) + vocab_size
        if top_k < vocab_size:
            above, mass, low, equal = _survey(row_ptr, vocab_size, floor, best, False, BLOCK)
            base = above.to(tl.float64)
            if above >= top_k:
                floor, base = _search(
                    row_ptr, scratch_ptr, vocab_size, best, low, above, top_k.to(tl.float64),
                    False, BLOCK,
                )  # fmt: skip
            num_equal = top_k - base.to(tl.int32)
        # A largest logit without bounds leaves no probabilities to add up.
        if (top_p < 1) & (best > float("-inf")) & (best < float("inf")):
            above, mass, low, equal = _survey(row_ptr, vocab_size, floor, best, True, BLOCK)
            num_equal = tl.minimum(num_equal, equal)
            goal = top_p * (mass + num_equal.to(tl.float64) * _mass(floor, best))
            base = mass
            if (mass >= goal) & (above > 0):
                floor, base = _search(
                    row_ptr, scratch_ptr, vocab_size, best, low, above, goal, True, BLOCK
                )
                num_equal = tl.full((), 0, tl.int32) + vocab_size
            # Equal logits stay while the mass before them is less than the goal; one always does.
            share = tl.ceil((goal - base) / _mass(floor, best))
            share = tl.minimum(tl.maximum(share, 1.0), num_equal.to(tl.float64))
            num_equal = share.to(tl.int32)
        if floor > float("-inf"):
            _rule_out(row_ptr, vocab_size, floor, num_equal, BLOCK)


def filter_logits(logits: Tensor, log_min_p: Tensor, top_k: Tensor, top_p: Tensor) -> None:
    """Write -inf over the logits that the filters rule out, in place; the others stay as they are.

    ``logits``: ``[num_rows, vocab_size]``, contiguous, float32, divided by the temperature; -inf
    where an id is banned. Per row (``[num_rows]``): ``log_min_p``, float32, the logarithm of min_p
    (-inf: no filter); ``top_k``, int32, at least 1 (``vocab_size``: no filter); ``top_p``, float64
    (1: no filter). First min_p; then the ``top_k`` largest of what is left, equal ones by id; then
    top_p of the probability that is left, in the same order, one token at the least. In a row
    with a filter a NaN counts as -inf.
    """
    num_rows, vocab_size = logits.shape
    scratch = torch.empty((num_rows, _BLOCK), dtype=torch.float32, device=logits.device)
    if num_rows:
        _filter_kernel[(num_rows,)](
            logits, scratch, log_min_p, top_k, top_p, vocab_size,
            BLOCK=_BLOCK, num_warps=_NUM_WARPS,
        )  # fmt: skip
