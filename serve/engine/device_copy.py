"""Small host data onto the device without waiting for what runs there."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def to_device(values: Any, dtype: torch.dtype, device: torch.device) -> Tensor:
    """``values`` (what ``torch.as_tensor`` takes) as a tensor of ``device``."""
    return _copy(torch.as_tensor(values, dtype=dtype), device)


def columns_to_device(columns: Sequence[Tensor], device: torch.device) -> list[Tensor]:
    """``columns`` on ``device`` by one copy. The widest types come first, so that all align."""
    moved = _copy(torch.cat([column.view(torch.uint8) for column in columns]), device)
    parts = torch.split(moved, [column.nbytes for column in columns])
    return [part.view(column.dtype) for part, column in zip(parts, columns, strict=True)]


def _copy(tensor: Tensor, device: torch.device) -> Tensor:
    """From pinned memory: another copy would wait."""
    if device.type == "cuda":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)
