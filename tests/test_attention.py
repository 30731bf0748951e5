"""The torch attention, which is the reference of the others, against float64 without a cache."""

from __future__ import annotations

import math

import pytest
import torch

from serve.model.attention import PLAIN, Scoring, torch_attention
from tests import test_gpu_kernels
from tests.test_gpu_kernels import BLOCK_SIZE, SCORINGS, assert_near, exact_attention, make_case

LENGTHS = [(1, 1), (1, 65), (1, 300), (5, 5), (130, 130), (64, 200), (1, 77), (1, 78)]


@pytest.mark.parametrize("name", ["plain", *SCORINGS])
@pytest.mark.parametrize("group", [1, 4])
def test_against_float64(name: str, group: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """What lies before every window is not read: here it is no number."""
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
