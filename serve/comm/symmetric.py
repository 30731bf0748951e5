"""Symmetric memory: GPU memory that the other GPUs of the host read and write over NVLink.

torch numbers its exchanges of memory handles per process, not per group. So ranks can allocate
symmetric memory together only if all have made equally many allocations before. A job therefore
allocates one arena of all ranks first, then one reduction buffer per tensor-parallel group, and
nothing after that. Multicast is not used.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from serve.topology import RankInfo

MAX_REDUCTION_BYTES = 8 << 20  # above this, NCCL is as fast
_ONE_SHOT_BYTES = 128 << 10
_ALIGNMENT = 16  # bytes: the unit in which a rank reads its part


class SymmetricArena:
    """Equally many bytes on every rank of the job, and flags. Its creation is a collective."""

    def __init__(self, num_bytes: int, device: torch.device) -> None:
        self.own, self._handle = _share(num_bytes, dist.group.WORLD, device)

    def of(self, rank: int) -> Tensor:
        """Return the memory of ``rank``: ``[num_bytes]``, uint8."""
        memory: Tensor = self._handle.get_buffer(rank, self.own.shape, torch.uint8)
        return memory

    def set_flag(self, rank: int, number: int) -> None:
        """Set this rank's flag ``number`` at ``rank``, after the current stream's copies."""
        self._handle.put_signal(rank, number)

    def await_flag(self, rank: int, number: int) -> None:
        """Let the current stream wait until ``rank`` has set its flag here, then clear the flag."""
        self._handle.wait_signal(rank, number)


class SymmetricReduction:
    """All-reduce of small tensors in which each rank reads the others' summands.

    NCCL takes 12 us for an all-reduce of a decode step; this takes 6 to 7. Small tensors take one
    shot (every rank reads all summands), because latency dominates. Larger ones take two shots
    (every rank sums a part, then reads the other parts).
    """

    def __init__(self, group: dist.ProcessGroup, device: torch.device) -> None:
        self._buffer, _ = _share(MAX_REDUCTION_BYTES, group, device)
        self._group_name = group.group_name
        self._size = dist.get_world_size(group)

    def buffer(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor | None:
        """Return the memory for this rank's summand, or None if NCCL must sum it.

        Float32 is left to NCCL, so that exact comparisons do not depend on this machine's links.
        The memory is valid until ``all_reduce``.
        """
        num_bytes = torch.Size(shape).numel() * dtype.itemsize
        if dtype is not torch.bfloat16 or not 0 < num_bytes <= MAX_REDUCTION_BYTES:
            return None
        if num_bytes % (_ALIGNMENT * self._size):
            return None
        return self._buffer[:num_bytes].view(dtype).view(shape)

    def holds(self, x: Tensor) -> bool:
        """Return whether ``x`` comes from ``buffer``."""
        return x.data_ptr() == self._buffer.data_ptr()

    def all_reduce(self, x: Tensor) -> Tensor:
        """Return the sum of all ranks' ``x`` (from ``buffer``) as a new tensor."""
        ops = torch.ops.symm_mem
        if x.numel() * x.itemsize <= _ONE_SHOT_BYTES:
            total: Tensor = ops.one_shot_all_reduce(x, "sum", self._group_name)
        else:
            total = ops.two_shot_all_reduce_out(x, "sum", self._group_name, torch.empty_like(x))
        return total


def can_share_memory(rank_info: RankInfo, ranks: Sequence[int]) -> bool:
    """Return whether the GPUs of ``ranks`` are on one host and can read each other's memory.

    The result is the same on all of them.
    """
    hosts = {rank // rank_info.local_world_size for rank in ranks}
    if len(hosts) > 1 or not torch.cuda.is_available():
        return False
    devices = [rank % rank_info.local_world_size for rank in ranks]
    return all(
        torch.cuda.can_device_access_peer(device, peer)
        for device in devices
        for peer in devices
        if device != peer
    )


def _share(
    num_bytes: int, group: dist.ProcessGroup | None, device: torch.device
) -> tuple[Tensor, Any]:
    """Allocate symmetric memory on all ranks of ``group``; returns it with its handle."""
    from torch.distributed import _symmetric_memory as symmetric_memory

    if group is None:
        raise RuntimeError("the job has no process group")
    memory = symmetric_memory.empty(num_bytes, dtype=torch.uint8, device=device)
    return memory, symmetric_memory.rendezvous(memory, group)
