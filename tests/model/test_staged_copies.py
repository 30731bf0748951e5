"""Tensors copied in pieces by threads arrive complete, and a thread's error is raised."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from serve.model.weights.staged_copies import NUM_SLOTS, StagedCopies

CPU = torch.device("cpu")
SHAPES = [(), (0,), (1,), (5000,), (3, 4), (1000, 7), (2, 3000), (5, 0), (4, 3, 600)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_tensor_arrives(dtype: torch.dtype) -> None:
    """Any shape, strides and type, with slots smaller and larger than a row."""
    seed = random.randrange(1 << 30)
    print(f"seed={seed}")
    generator = torch.Generator().manual_seed(seed)
    sources = [torch.randn(shape, generator=generator) for shape in SHAPES * 4]
    sources += [torch.randn(300, 40, generator=generator)[:, 3:17], torch.randn(9, 50).t()]
    targets = [torch.full(source.shape, -1.0, dtype=dtype) for source in sources]
    with StagedCopies(CPU, slot_bytes=1024) as copies:
        for target, source in zip(targets, sources, strict=True):
            copies.add(target, source)
    for target, source in zip(targets, sources, strict=True):
        assert torch.equal(target, source.to(dtype))


def test_a_target_is_a_view() -> None:
    whole, source = torch.zeros(100, 30), torch.randn(40, 30)
    with StagedCopies(CPU, slot_bytes=500) as copies:
        copies.add(whole[20:60], source)
    assert torch.equal(whole[20:60], source)
    assert not whole[:20].any()
    assert not whole[60:].any()


def test_more_pieces_than_slots_keep_to_the_slots(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[int] = []
    monkeypatch.setattr(torch, "empty", _counted(torch.empty, made))
    target, source = torch.zeros(50 * NUM_SLOTS, 16), torch.randn(50 * NUM_SLOTS, 16)
    with StagedCopies(CPU, slot_bytes=64) as copies:
        copies.add(target, source)
    assert torch.equal(target, source)
    assert made == [64] * NUM_SLOTS


def _counted(make: Callable[..., Tensor], sizes: list[int]) -> Callable[..., Tensor]:
    def counted(size: int, **options: Any) -> Tensor:
        sizes.append(size)
        return make(size, **options)

    return counted


def test_a_failed_copy_raises() -> None:
    """The error is raised in ``add`` or at the end of the block, and all threads end."""
    before = threading.active_count()
    for good in (0, 2 * NUM_SLOTS):
        with pytest.raises(RuntimeError, match="size of tensor"):
            _copy_bad_then_good(good)
    assert threading.active_count() == before


def _copy_bad_then_good(num_good_rows: int) -> None:
    with StagedCopies(CPU, slot_bytes=64) as copies:
        copies.add(torch.zeros(4, 3), torch.zeros(4, 2))
        copies.add(torch.zeros(num_good_rows, 16), torch.zeros(num_good_rows, 16))
