"""The device of a rank, and copies of small host data to it that do not wait for its work."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def pick_device(local_rank: int) -> torch.device:
    """The GPU of this rank, or the CPU if torch sees no GPU.

    Call it before anything else asks the CUDA driver a question, because the driver reads the
    variables set here only once.
    """
    # Transfers wait for each other on streams of their own, so no two streams may share a queue.
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "32")
    # Loading a kernel synchronises the GPU, so all are loaded before any transfer waits.
    os.environ.setdefault("CUDA_MODULE_LOADING", "EAGER")
    os.environ.setdefault("NCCL_NVLS_ENABLE", "0")
    os.environ.setdefault("TORCH_SYMM_MEM_DISABLE_MULTICAST", "1")
    if not torch.cuda.is_available():
        return torch.device("cpu")
    device = torch.device("cuda", local_rank)
    torch.cuda.set_device(device)
    return device


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
