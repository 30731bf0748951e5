"""The device of a rank, and small copies to it that do not wait for the work queued there."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def pick_device(local_rank: int) -> torch.device:
    """Return the GPU of this rank, or the CPU if torch sees no GPU.

    Call it before any other use of the CUDA driver, because the driver reads the variables that
    are set here only once.
    """
    # Streams that share a hardware queue block each other, and transfers wait for each other on
    # several streams. So every stream needs a queue of its own.
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "32")
    # Loading a kernel synchronises the GPU, so all kernels are loaded before any transfer waits.
    os.environ.setdefault("CUDA_MODULE_LOADING", "EAGER")
    os.environ.setdefault("NCCL_NVLS_ENABLE", "0")
    os.environ.setdefault("TORCH_SYMM_MEM_DISABLE_MULTICAST", "1")
    if not torch.cuda.is_available():
        return torch.device("cpu")
    device = torch.device("cuda", local_rank)
    torch.cuda.set_device(device)
    return device


def to_device(values: Any, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Copy ``values``, anything that ``torch.as_tensor`` accepts, to ``device``."""
    return _copy(torch.as_tensor(values, dtype=dtype), device)


def columns_to_device(columns: Sequence[Tensor], device: torch.device) -> list[Tensor]:
    """Copy ``columns`` to ``device`` in one copy.

    Give the columns with the widest types first, so that each one is aligned in the joint buffer.
    """
    moved = _copy(torch.cat([column.view(torch.uint8) for column in columns]), device)
    parts = torch.split(moved, [column.nbytes for column in columns])
    return [part.view(column.dtype) for part, column in zip(parts, columns, strict=True)]


def _copy(tensor: Tensor, device: torch.device) -> Tensor:
    # A copy from memory that is not pinned would wait for the stream.
    if device.type == "cuda":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)
