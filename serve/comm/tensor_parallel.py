"""TensorParallel: the ranks that share the model's layers, and their collective operations."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from serve.comm.symmetric import SymmetricReduction


@dataclass(frozen=True, slots=True)
class TensorParallel:
    """This rank's place among the ``size`` ranks of ``group``; rank 0 is the leader.

    The group holds exactly these ranks, in this order. With ``size`` 1 there is no group and
    nothing is sent. ``reduction`` is a faster all-reduce for small tensors, if available.
    """

    rank: int
    size: int
    group: dist.ProcessGroup | None = None
    reduction: SymmetricReduction | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.rank < self.size:
            raise ValueError(f"tp rank {self.rank} is not one of {self.size} ranks")
        if self.size > 1 and self.group is None:
            raise ValueError(f"tp {self.size} needs a process group")
        if self.group is not None:
            place = (dist.get_rank(self.group), dist.get_world_size(self.group))
            if place != (self.rank, self.size):
                raise ValueError(f"tp rank {self.rank} of {self.size} is {place} in its group")

    @property
    def is_leader(self) -> bool:
        """Whether this rank plans and samples for the others."""
        return self.rank == 0

    def summand(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor | None:
        """Return memory from which the next ``all_reduce`` is faster, or None if there is none."""
        return None if self.reduction is None else self.reduction.buffer(shape, dtype)

    def all_reduce(self, x: Tensor) -> Tensor:
        """Return the sum of ``x`` over the ranks. ``x`` is contiguous and may be overwritten."""
        if self.size == 1:
            return x
        if self.reduction is not None and self.reduction.holds(x):
            return self.reduction.all_reduce(x)
        dist.all_reduce(x, group=self.group)
        return x

    def broadcast(self, x: Tensor) -> None:
        """Copy the leader's ``x`` to every rank, in place. All are contiguous, of one shape."""
        if self.size > 1 and x.numel():
            leader = dist.get_global_rank(self.group, 0) if self.group is not None else 0
            dist.broadcast(x, leader, group=self.group)

    def gather_to_leader(self, x: Tensor) -> Tensor | None:
        """Concatenate the ranks' ``x`` in the last dimension on the leader; None on the others."""
        if self.size == 1:
            return x
        x = x.contiguous()
        if x.is_cuda:
            # torch builds a gather on NCCL from many sends, while an all-gather is one kernel.
            parts = x.new_empty((self.size, *x.shape))
            dist.all_gather_into_tensor(parts, x, group=self.group)
            return torch.cat(parts.unbind(), dim=-1) if self.is_leader else None
        received = [torch.empty_like(x) for _ in range(self.size)] if self.is_leader else None
        leader = dist.get_global_rank(self.group, 0) if self.group is not None else 0
        dist.gather(x, received, dst=leader, group=self.group)
        return None if received is None else torch.cat(received, dim=-1)
