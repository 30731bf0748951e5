"""Transports: move packed bytes from the staging slots of one rank to those of another.

A transport is one end of a directed pair of ranks. The receiver knows slot and size of each message
beforehand. It posts its receives in the order in which the sender sends.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from serve.comm.symmetric import SymmetricArena
from serve.protocol.messages import NUM_STAGING_SLOTS

Wait = Callable[[], object]  # blocks the calling thread until a transfer is complete


class Transport(Protocol):
    """One end of a pair. Operations are issued on the current stream and do not block the host."""

    staging: Tensor  # [NUM_STAGING_SLOTS, slot_bytes], uint8

    def send(self, slot: int, num_bytes: int) -> Wait | None:
        """Send the first ``num_bytes`` of ``slot``.

        Returns None when stream order alone guarantees completion, otherwise a function that blocks
        until the bytes are sent.
        """
        ...

    def receive(self, slot: int, num_bytes: int) -> Wait | None:
        """Receive ``num_bytes`` into ``slot``. Returns as ``send`` does."""
        ...

    def release(self, slot: int) -> None:
        """Free ``slot`` after its bytes were copied out of it. Only the receiver calls this."""
        ...

    def warm_up(self, *, sending: bool) -> None:
        """Use the transport once, because the first use is slow. Both ends must call it; blocks."""
        ...


class P2PTransport:
    """Matched sends and receives in a process group of the two ranks (NCCL, or gloo on CPUs)."""

    def __init__(
        self, peer: int, group: dist.ProcessGroup, slot_bytes: int, device: torch.device
    ) -> None:
        self._peer = peer
        self._group = group
        shape = (NUM_STAGING_SLOTS, slot_bytes)
        self.staging = torch.empty(shape, dtype=torch.uint8, device=device)

    def send(self, slot: int, num_bytes: int) -> Wait | None:
        """See ``Transport``."""
        return self._complete(dist.isend(self.staging[slot, :num_bytes], self._peer, self._group))

    def receive(self, slot: int, num_bytes: int) -> Wait | None:
        """See ``Transport``."""
        return self._complete(dist.irecv(self.staging[slot, :num_bytes], self._peer, self._group))

    def release(self, slot: int) -> None:
        """Do nothing, because a send waits for its receive, which is posted after the release."""

    def warm_up(self, *, sending: bool) -> None:
        """Send one small message, because the first one creates the communicator."""
        wait = (self.send if sending else self.receive)(0, 1)
        if wait is not None:
            wait()
        if self.staging.is_cuda:
            torch.cuda.synchronize(self.staging.device)

    def _complete(self, work: dist.Work | None) -> Wait | None:
        if work is None:
            raise RuntimeError(f"rank {self._peer} is not in the pair's group")
        if not self.staging.is_cuda:
            return work.wait
        work.wait()  # on NCCL: the current stream waits, the thread does not
        return None


class SymmetricTransport:
    """Copies through symmetric memory: the sender writes into the receiver's slot and sets a flag.

    The copy engine moves the bytes, so no multiprocessor is busy with them. A send does not wait
    until its receive is posted. The receiver sets a second flag of the slot when it is free again.
    """

    def __init__(
        self, arena: SymmetricArena, peer: int, own_offset: int, peer_offset: int, slot_bytes: int
    ) -> None:
        """Take the offsets of the pair's slots in the memory of this rank and of ``peer``."""
        self._arena, self._peer = arena, peer
        self.staging = _slots(arena.own, own_offset, slot_bytes)
        self._peer_staging = _slots(arena.of(peer), peer_offset, slot_bytes)
        self._used = [False] * NUM_STAGING_SLOTS

    def send(self, slot: int, num_bytes: int) -> None:
        """See ``Transport``."""
        if self._used[slot]:
            self._arena.await_flag(self._peer, _free_flag(slot))
        self._used[slot] = True
        source = self.staging[slot, :num_bytes]
        self._peer_staging[slot, :num_bytes].copy_(source, non_blocking=True)
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


def _slots(memory: Tensor, offset: int, slot_bytes: int) -> Tensor:
    size = NUM_STAGING_SLOTS * slot_bytes
    return memory[offset : offset + size].view(NUM_STAGING_SLOTS, slot_bytes)


def _full_flag(slot: int) -> int:
    return slot


def _free_flag(slot: int) -> int:
    return NUM_STAGING_SLOTS + slot
