"""Memory of one GPU that the GPUs of other ranks of the host read and write over NVLink.

torch numbers its exchanges of memory handles by process, not by group: ranks that make memory
together must have made as much before. So a job makes, in this order, one arena of all its ranks,
then a reduction of each tensor-parallel group, and nothing after. Nothing is multicast.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from serve.topology import RankInfo

MAX_REDUCTION_BYTES = 8 << 20  # above, NCCL is as fast
_ONE_SHOT_BYTES = 128 << 10
_ALIGNMENT = 16  # of what one rank reads at once


class SymmetricArena:
    """Equally many bytes of every rank of the job, and flags. Making it is a collective."""

    def __init__(self, num_bytes: int, device: torch.device) -> None:
        self.own, self._handle = _share(num_bytes, dist.group.WORLD, device)

    def of(self, rank: int) -> Tensor:
        """The bytes of ``rank``: ``[num_bytes]``, uint8."""
        theirs: Tensor = self._handle.get_buffer(rank, self.own.shape, torch.uint8)
        return theirs

    def set_flag(self, rank: int, number: int) -> None:
        """Set this rank's flag ``number`` at ``rank``, after what the current stream has copied."""
        self._handle.put_signal(rank, number)

    def await_flag(self, rank: int, number: int) -> None:
        """The current stream goes on when ``rank`` has set its flag here, which is cleared."""
        self._handle.wait_signal(rank, number)


class SymmetricReduction:
    """All-reduce of small tensors: each rank reads the others' summands.

    NCCL takes 12 us for what a decode step reduces; this takes 6 to 7. In one shot (every rank
    reads all) while latency counts, in two (every rank sums a part, then reads the other parts)
    above.
    """

    def __init__(self, group: dist.ProcessGroup, device: torch.device) -> None:
        self._buffer, _ = _share(MAX_REDUCTION_BYTES, group, device)
        self._group_name = group.group_name
        self._size = dist.get_world_size(group)

    def buffer(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor | None:
        """Where to write what is to be summed, until it is; None for what is not for this way.

        Float32 is left to NCCL, so that exact comparisons do not depend on this machine's links.
        """
        num_bytes = torch.Size(shape).numel() * dtype.itemsize
        if dtype is not torch.bfloat16 or not 0 < num_bytes <= MAX_REDUCTION_BYTES:
            return None
        if num_bytes % (_ALIGNMENT * self._size):
            return None
        return self._buffer[:num_bytes].view(dtype).view(shape)

    def holds(self, x: Tensor) -> bool:
        """Whether ``x`` was made by ``buffer``."""
        return x.data_ptr() == self._buffer.data_ptr()

    def all_reduce(self, x: Tensor) -> Tensor:
        """The sum of all ranks' ``x`` (of ``buffer``), in memory of its own."""
        ops = torch.ops.symm_mem
        if x.numel() * x.itemsize <= _ONE_SHOT_BYTES:
            total: Tensor = ops.one_shot_all_reduce(x, "sum", self._group_name)
        else:
            total = ops.two_shot_all_reduce_out(x, "sum", self._group_name, torch.empty_like(x))
        return total


def can_share_memory(rank_info: RankInfo, ranks: Sequence[int]) -> bool:
    """Whether the GPUs of ``ranks`` can read each other's memory: on one host, and connected.

    All of them find the same.
    """
    hosts = {rank // rank_info.local_world_size for rank in ranks}
    if len(hosts) > 1 or not torch.cuda.is_available():
        return False
    devices = [rank % rank_info.local_world_size for rank in ranks]
    return all(
        torch.cuda.can_device_access_peer(one, other)
        for one in devices
        for other in devices
        if one != other
    )


def _share(
    num_bytes: int, group: dist.ProcessGroup | None, device: torch.device
) -> tuple[Tensor, Any]:
    """Memory that all ranks of ``group`` make alike, and what reaches the others' part of it."""
    from torch.distributed import _symmetric_memory as symmetric_memory

    if group is None:
        raise RuntimeError("the process group of the job is not there")
    memory = symmetric_memory.empty(num_bytes, dtype=torch.uint8, device=device)
    return memory, symmetric_memory.rendezvous(memory, group)
