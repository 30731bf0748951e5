"""The tokens that min_p, top_k and top_p leave in a row, found on a GPU without sorting the row.

Each filter keeps the logits above a threshold of the row and, of the logits equal to it, the first
few by id. The threshold is the largest value for which the logits at or above it reach a target
weight: the count ``top_k``, or the share ``top_p`` of the probability. Bisection finds it. Each
pass reads the whole row, which lies in the L2 cache, until the logits between the bounds fit into
registers. The rest of the bisection runs there.

One program handles one row. Nothing depends on the host, and no sum depends on the order in which
threads run. A loop ends when its bounds meet. Every second step halves the number of floats between
the bounds, so no input, NaN included, takes more than about 64 passes. A usual row takes a few.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_BLOCK = 8192  # elements that one program holds in registers
_NUM_WARPS = 16


@triton.jit
def _load(row_ptr, start, vocab_size, BLOCK: tl.constexpr):
    """Load a block of the row. NaN, and ids beyond the vocabulary, count as ruled out (-inf)."""
    ids = start + tl.arange(0, BLOCK)
    x = tl.load(row_ptr + ids, ids < vocab_size, float("-inf"))
    return tl.where(x == x, x, float("-inf"))


@triton.jit
def _relative_prob(x, max_logit):
    """Return the probability divided by that of the row's largest logit, float64."""
    return tl.exp(x.to(tl.float64) - max_logit.to(tl.float64))


@triton.jit
def _max_of_row(row_ptr, vocab_size, BLOCK: tl.constexpr):
    max_logits = tl.full((BLOCK,), float("-inf"), tl.float32)
    for start in range(0, vocab_size, BLOCK):
        max_logits = tl.maximum(max_logits, _load(row_ptr, start, vocab_size, BLOCK))
    return tl.max(max_logits, 0)


@triton.jit
def _measure_above(
    row_ptr, vocab_size, threshold, max_logit, SUM_PROBS: tl.constexpr, BLOCK: tl.constexpr
):
    """Measure the logits above ``threshold``.

    Returns their count, the sum of their relative probabilities (0 unless ``SUM_PROBS``), the
    smallest of them, and the count of the logits equal to ``threshold``.
    """
    num_above = tl.zeros((BLOCK,), tl.int32)
    num_equal = tl.zeros((BLOCK,), tl.int32)
    prob_sum = tl.zeros((BLOCK,), tl.float64)
    smallest = tl.full((BLOCK,), float("inf"), tl.float32)
    for start in range(0, vocab_size, BLOCK):
        x = _load(row_ptr, start, vocab_size, BLOCK)
        is_above = x > threshold
        num_above += is_above.to(tl.int32)
        num_equal += (x == threshold).to(tl.int32)
        smallest = tl.minimum(smallest, tl.where(is_above, x, float("inf")))
        if SUM_PROBS:
            prob_sum += tl.where(is_above, _relative_prob(x, max_logit), 0.0)
    return tl.sum(num_above, 0), tl.sum(prob_sum, 0), tl.min(smallest, 0), tl.sum(num_equal, 0)


@triton.jit
def _measure_between(
    row_ptr, vocab_size, low, high, max_logit, SUM_PROBS: tl.constexpr, BLOCK: tl.constexpr
):
    """Return count and weight of the logits in ``[low, high]``.

    The weight (float64) is the sum of relative probabilities, or the count.
    """
    count = tl.zeros((BLOCK,), tl.int32)
    prob_sum = tl.zeros((BLOCK,), tl.float64)
    for start in range(0, vocab_size, BLOCK):
        x = _load(row_ptr, start, vocab_size, BLOCK)
        is_between = (x >= low) & (x <= high)
        count += is_between.to(tl.int32)
        if SUM_PROBS:
            prob_sum += tl.where(is_between, _relative_prob(x, max_logit), 0.0)
    num_between = tl.sum(count, 0)
    weight = num_between.to(tl.float64)
    if SUM_PROBS:
        weight = tl.sum(prob_sum, 0)
    return num_between, weight


@triton.jit
def _to_order(x):
    """Return the int32 that orders floats by value; both zeros become 0."""
    bits = x.to(tl.int32, bitcast=True)
    return tl.where(bits < 0, -(bits & 0x7FFFFFFF), bits)


@triton.jit
def _from_order(order):
    magnitude = tl.abs(order).to(tl.float32, bitcast=True)
    return tl.where(order < 0, -magnitude, magnitude)


@triton.jit
def _midpoint(low, high, by_value):
    """Return a float in ``(low, high]``: the mean, or the median of the floats between them."""
    low_order, high_order = _to_order(low), _to_order(high)
    # This form of the mean cannot overflow; the sum of both numbers could.
    median = _from_order((low_order & high_order) + ((low_order ^ high_order) >> 1) + 1)
    mean = low * 0.5 + high * 0.5
    return tl.where((by_value > 0) & (mean > low) & (mean <= high), mean, median)


@triton.jit
def _collect(row_ptr, scratch_ptr, vocab_size, low, high, BLOCK: tl.constexpr):
    """Return the logits in ``[low, high]`` in the order of their ids, padded with -inf.

    There must be at most ``BLOCK`` of them.
    """
    tl.debug_barrier()  # no thread may still read what an earlier call stored there
    num_stored = tl.full((), 0, tl.int32)
    for start in range(0, vocab_size, BLOCK):
        x = _load(row_ptr, start, vocab_size, BLOCK)
        is_between = (x >= low) & (x <= high)
        position = tl.cumsum(is_between.to(tl.int32), 0)
        tl.store(scratch_ptr + num_stored + position - 1, x, is_between)
        num_stored += tl.sum(is_between.to(tl.int32), 0)
    tl.debug_barrier()  # each thread reads what others stored
    index = tl.arange(0, BLOCK)
    return tl.load(scratch_ptr + index, index < num_stored, float("-inf"))


@triton.jit
def _find_threshold(
    row_ptr, scratch_ptr, vocab_size, max_logit, low, num_between, target_weight,
    SUM_PROBS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Find the largest value for which the logits at or above it weigh ``target_weight`` or more.

    ``num_between`` logits lie in ``[low, max_logit]``, and together they weigh at least that.
    Returns the value, and the weight of the logits above it.
    """
    high = max_logit
    weight_above = tl.full((), 0.0, tl.float64)  # of the logits above high
    by_value = tl.full((), 1, tl.int32)
    while (num_between > BLOCK) & (low < high):
        pivot = _midpoint(low, high, by_value)
        count, weight = _measure_between(
            row_ptr, vocab_size, pivot, high, max_logit, SUM_PROBS, BLOCK
        )
        is_enough = weight_above + weight >= target_weight
        low = tl.where(is_enough, pivot, low)
        high = tl.where(is_enough, high, _from_order(_to_order(pivot) - 1))
        weight_above = tl.where(is_enough, weight_above, weight_above + weight)
        num_between = tl.where(is_enough, count, num_between - count)
        by_value = 1 - by_value
    if low < high:
        x = _collect(row_ptr, scratch_ptr, vocab_size, low, high, BLOCK)
        weights = tl.full((BLOCK,), 1.0, tl.float64)
        if SUM_PROBS:
            weights = _relative_prob(x, max_logit)
        while low < high:
            pivot = _midpoint(low, high, 0)
            is_enough = (
                weight_above + tl.sum(tl.where(x >= pivot, weights, 0.0), 0) >= target_weight
            )
            low = tl.where(is_enough, pivot, low)
            high = tl.where(is_enough, high, _from_order(_to_order(pivot) - 1))
        weight_above += tl.sum(tl.where(x > low, weights, 0.0), 0)
    return low, weight_above


@triton.jit
def _rule_out(row_ptr, vocab_size, threshold, num_equal_kept, BLOCK: tl.constexpr):
    """Keep the logits above ``threshold`` and the first ``num_equal_kept`` equal to it."""
    num_equal = tl.full((), 0, tl.int32)
    for start in range(0, vocab_size, BLOCK):
        x = _load(row_ptr, start, vocab_size, BLOCK)
        is_equal = (x == threshold).to(tl.int32)
        position = num_equal + tl.cumsum(is_equal, 0)
        kept = (x > threshold) | ((x == threshold) & (position <= num_equal_kept))
        ids = start + tl.arange(0, BLOCK)
        tl.store(row_ptr + ids, tl.where(kept, x, float("-inf")), ids < vocab_size)
        num_equal += tl.sum(is_equal, 0)


# Compiled once for all batches, because the columns of parameters start at any alignment within the
# buffer that carried them to the GPU.
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
        max_logit = _max_of_row(row_ptr, vocab_size, BLOCK)
        # Kept so far: the logits above threshold, and the first num_equal_kept equal to it.
        threshold = tl.where(log_min_p > float("-inf"), max_logit + log_min_p, float("-inf"))
        num_equal_kept = tl.full((), 0, tl.int32) + vocab_size
        if top_k < vocab_size:
            num_above, prob_above, smallest, num_equal = _measure_above(
                row_ptr, vocab_size, threshold, max_logit, False, BLOCK
            )
            weight_above = num_above.to(tl.float64)
            if num_above >= top_k:
                threshold, weight_above = _find_threshold(
                    row_ptr, scratch_ptr, vocab_size, max_logit, smallest, num_above,
                    top_k.to(tl.float64), False, BLOCK,
                )  # fmt: skip
            num_equal_kept = top_k - weight_above.to(tl.int32)
        # With an infinite largest logit there are no probabilities to add up.
        if (top_p < 1) & (max_logit > float("-inf")) & (max_logit < float("inf")):
            num_above, prob_above, smallest, num_equal = _measure_above(
                row_ptr, vocab_size, threshold, max_logit, True, BLOCK
            )
            num_equal_kept = tl.minimum(num_equal_kept, num_equal)
            target_weight = top_p * (
                prob_above + num_equal_kept.to(tl.float64) * _relative_prob(threshold, max_logit)
            )
            weight_above = prob_above
            if (prob_above >= target_weight) & (num_above > 0):
                threshold, weight_above = _find_threshold(
                    row_ptr, scratch_ptr, vocab_size, max_logit, smallest, num_above,
                    target_weight, True, BLOCK,
                )  # fmt: skip
                num_equal_kept = tl.full((), 0, tl.int32) + vocab_size
            # An equal logit is kept while the weight before it is below the target; one always is.
            num_needed = tl.ceil(
                (target_weight - weight_above) / _relative_prob(threshold, max_logit)
            )
            num_needed = tl.minimum(tl.maximum(num_needed, 1.0), num_equal_kept.to(tl.float64))
            num_equal_kept = num_needed.to(tl.int32)
        if threshold > float("-inf"):
            _rule_out(row_ptr, vocab_size, threshold, num_equal_kept, BLOCK)


def filter_logits(logits: Tensor, log_min_p: Tensor, top_k: Tensor, top_p: Tensor) -> None:
    """Write -inf over the logits that the filters rule out, in place; leave the others unchanged.

    ``logits`` is ``[num_rows, vocab_size]``, contiguous, float32, divided by the temperature, and
    -inf where an id is banned. The other arguments are ``[num_rows]``:

    - ``log_min_p``, float32: the logarithm of min_p (-inf: no filter)
    - ``top_k``, int32: at least 1 (``vocab_size``: no filter)
    - ``top_p``, float64 (1: no filter)

    min_p comes first. Then the ``top_k`` largest of the rest are kept, equal ones by id. Then top_p
    of the remaining probability is kept in the same order, at least one token. In a row with a
    filter a NaN counts as -inf.
    """
    num_rows, vocab_size = logits.shape
    scratch = torch.empty((num_rows, _BLOCK), dtype=torch.float32, device=logits.device)
    if num_rows:
        _filter_kernel[(num_rows,)](
            logits, scratch, log_min_p, top_k, top_p, vocab_size,
            BLOCK=_BLOCK, num_warps=_NUM_WARPS,
        )  # fmt: skip
