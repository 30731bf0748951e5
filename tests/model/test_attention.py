"""The torch attention, the reference for the faster ones, equals float64 without a cache."""

from __future__ import annotations

import math

import pytest
import torch

from serve.model.attention import PLAIN, Scoring, torch_attention
from serve.model.kernels import ops
from tests.gpu import test_kernels as test_gpu_kernels
from tests.gpu.test_kernels import BLOCK_SIZE, SCORINGS, assert_near, exact_attention, make_case

LENGTHS = [(1, 1), (1, 65), (1, 300), (5, 5), (130, 130), (64, 200), (1, 77), (1, 78)]


@pytest.mark.parametrize("name", ["plain", *SCORINGS])
@pytest.mark.parametrize("group", [1, 4])
def test_against_float64(name: str, group: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks before every window are not read: here they hold NaN."""
    monkeypatch.setattr(test_gpu_kernels, "GPU", torch.device("cpu"))
    torch.manual_seed(1)
    scoring: Scoring = SCORINGS.get(name, PLAIN)
    q, k, v, metadata = make_case(LENGTHS, 2 * group, 2, 16, torch.float32)
    exact = exact_attention(q, k, v, metadata, scoring)
    if scoring.window is not None:
        for index, (new, total) in enumerate(LENGTHS):
            unseen = max(0, total - new + 1 - scoring.window) // BLOCK_SIZE
            for cache in (k, v):
                cache[metadata.block_tables[index, :unseen].long()] = math.nan
    assert_near(torch_attention(q, k, v, metadata, scoring), exact, torch.float32)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_nan_and_infinity_are_written_as_zero(dtype: torch.dtype, value: float) -> None:
    """Readers of the cache rely on finite values everywhere."""
    qkv = torch.randn(5, 6 * 16, dtype=dtype)
    qkv[1, ::3] = value
    angles = torch.randn(5, 8)
    cache = torch.zeros(2, 2, 4, 1, 16, dtype=dtype)
    slots = torch.tensor([6, 1, 0, 3, 7])
    keys, values = cache[:, 0], cache[:, 1]
    ops.rope_write(qkv, angles.cos(), angles.sin(), keys, values, slots)
    assert bool(cache.isfinite().all())
    written = values[0, 1, 0]
    assert torch.equal(written, torch.where(qkv[1, -16:].isfinite(), qkv[1, -16:], 0.0))
    assert torch.equal(values[1, 2, 0], qkv[0, -16:])
