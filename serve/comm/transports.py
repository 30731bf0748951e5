"""How packed bytes cross between two ranks, from staging slots of one to those of the other.

A wire is one end of a directed pair. Both ends agree beforehand on what travels: the receiver posts
each message by slot and size, in the order in which the sender sends.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from serve.comm.symmetric import SymmetricArena
from serve.protocol.messages import NUM_STAGING_SLOTS

Wait = Callable[[], object]  # blocks the calling thread until a transfer is done


class Transport(Protocol):
    """One end. Everything is issued on the current stream, and blocks the host for nothing."""

    staging: Tensor  # [NUM_STAGING_SLOTS, slot_bytes], uint8

    def send(self, slot: int, num_bytes: int) -> Wait | None:
        """Send the first bytes of ``slot``; None if the stream's order says when they are gone."""
        ...

    def receive(self, slot: int, num_bytes: int) -> Wait | None:
        """Receive into ``slot``; None if the stream's order says when they are there."""
        ...

    def release(self, slot: int) -> None:
        """What was received into ``slot`` has been taken out of it; only by the receiver."""
        ...

    def warm_up(self, *, sending: bool) -> None:
        """Do once all that would be slow the first time. Both ends must call it; blocks."""
        ...


class P2PTransport:
    """Matched sends and receives of a process group of the two ranks (NCCL, or gloo on CPUs)."""

    def __init__(
        self, peer: int, group: dist.ProcessGroup, slot_bytes: int, device: torch.device
    ) -> None:
        self.peer = peer
        self._group = group
        shape = (NUM_STAGING_SLOTS, slot_bytes)
        self.staging = torch.empty(shape, dtype=torch.uint8, device=device)

    def send(self, slot: int, num_bytes: int) -> Wait | None:
        """See ``Transport``."""
        return self._settle(dist.isend(self.staging[slot, :num_bytes], self.peer, self._group))

    def receive(self, slot: int, num_bytes: int) -> Wait | None:
        """See ``Transport``."""
        return self._settle(dist.irecv(self.staging[slot, :num_bytes], self.peer, self._group))

    def release(self, slot: int) -> None:
        """Nothing: the sender's bytes wait for the next receive into the slot."""

    def warm_up(self, *, sending: bool) -> None:
        """Make the communicator, by one small message."""
        wait = (self.send if sending else self.receive)(0, 1)
        if wait is not None:
            wait()
        if self.staging.is_cuda:
            torch.cuda.synchronize(self.staging.device)

    def _settle(self, work: dist.Work | None) -> Wait | None:
        if work is None:
            raise RuntimeError(f"rank {self.peer} is not in the pair's group")
        if not self.staging.is_cuda:
            return work.wait
        work.wait()  # on NCCL: the current stream waits, the thread does not
        return None


class SymmetricTransport:
    """Symmetric memory: the sender's copy engine writes into the receiver's slot, then sets a flag.

    No multiprocessor is busy with the bytes, and they do not wait for their receive to be posted.
    A second flag of each slot says to the sender that it is free again.
    """

    def __init__(
        self, arena: SymmetricArena, peer: int, ours: int, theirs: int, slot_bytes: int
    ) -> None:
        """``ours`` and ``theirs``: where the slots begin in each rank's part of ``arena``."""
        self._arena, self._peer = arena, peer
        size = NUM_STAGING_SLOTS * slot_bytes
        self.staging = arena.own[ours : ours + size].view(NUM_STAGING_SLOTS, slot_bytes)
        self._theirs = arena.of(peer)[theirs : theirs + size].view(NUM_STAGING_SLOTS, slot_bytes)
        self._used = [False] * NUM_STAGING_SLOTS

    def send(self, slot: int, num_bytes: int) -> None:
        """See ``Transport``."""
        if self._used[slot]:
            self._arena.await_flag(self._peer, _free_flag(slot))
        self._used[slot] = True
        source = self.staging[slot, :num_bytes]
        self._theirs[slot, :num_bytes].copy_(source, non_blocking=True)
        self._arena.set_flag(self._peer, _full_flag(slot))

    def receive(self, slot: int, num_bytes: int) -> None:
        """See ``Transport``."""
        self._arena.await_flag(self._peer, _full_flag(slot))

    def release(self, slot: int) -> None:
        """See ``Transport``."""
        self._arena.set_flag(self._peer, _free_flag(slot))

    def warm_up(self, *, sending: bool) -> None:
        """See ``Transport``."""
        if sending:
            self.send(0, self.staging.shape[1])
        else:
            self.receive(0, self.staging.shape[1])
            self.release(0)
        torch.cuda.synchronize(self.staging.device)


def _full_flag(slot: int) -> int:
    return slot


def _free_flag(slot: int) -> int:
    return NUM_STAGING_SLOTS + slot
