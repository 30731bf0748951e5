"""KV transfer between ranks through staging slots: pack, send, receive, unpack.

A push is sent in four operations. On a GPU each has its stream:

- Pack copies KV blocks into a staging slot of the sender, on the sender's packing stream.
- Send and receive move the slot to the receiver, on one stream per directed pair of ranks.
- Unpack copies the slot into KV blocks of the receiver, on the receiver's compute stream.

On CPUs, sends and receives run in gloo's threads, and the rest runs in the calling thread.

Packing has a stream of its own so that a push starts when its blocks are computed. On the compute
stream it would wait for the steps before it, which on a busy prefill rank are whole prompts.
Packing needs no event to read complete blocks. The leader plans it after it has the result of the
step that wrote them, and on its followers the last all-reduce of that step comes after their
writes. The blocks cannot change, because they are freed only when the push is acknowledged.

Unpacking is on the compute stream, in plan order, so every writer of KV blocks is on one stream.

Events order the uses of a staging slot (operation (stream) between events)::

    sender    sent[slot] -> pack (packing) -> packed -> send (pair) -> sent[slot]
    receiver  unpacked[slot] -> receive (pair) -> filled[slot] -> unpack (compute) -> unpacked[slot]

A push is sent only after the previous push in its slot is acknowledged. The receiver acknowledges
a push when it is in the slot, so none of these waits is longer than the steps that are running.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext

import torch
from torch import Tensor

from serve.comm.transports import Transport, Wait
from serve.device import to_device
from serve.protocol.messages import NUM_STAGING_SLOTS

_MAX_WARM_BLOCKS = 1 << 14  # block ids in a push, for which memory is allocated at start


class Pair:
    """One end of a directed pair of ranks: its transport, its stream and the state of its slots.

    ``heads`` are the positions of the transferred heads in this rank's layout, in the order of the
    packed form: ``[num_blocks, num_layers, 2, block_size, len(heads), head_dim]``.
    """

    def __init__(
        self,
        cache: Tensor,  # [num_blocks, num_layers, 2, block_size, num_kv_heads, head_dim]
        heads: tuple[int, ...],
        transport: Transport,
    ) -> None:
        self._cache = cache = _widen(cache)
        self._transport = transport
        self._all_heads = heads == tuple(range(cache.shape[4]))
        self._heads = torch.tensor(heads, device=cache.device)
        self._shape = (*cache.shape[1:4], len(heads), cache.shape[5])  # of a packed block
        self._block_bytes = packed_bytes(cache, len(heads))
        self._on_gpu = cache.is_cuda
        self._stream = (
            torch.cuda.Stream() if self._on_gpu else None  # type: ignore[no-untyped-call]
        )
        # The slot's last use: ``sent`` at the sender, ``unpacked`` at the receiver.
        self._last_use: list[Wait | torch.cuda.Event | None] = [None] * NUM_STAGING_SLOTS
        self._filled: list[torch.cuda.Event | None] = [None] * NUM_STAGING_SLOTS

    def warm_up(self) -> None:
        """Pack block 0 into this rank's own slot and unpack it again, to load both kernels."""
        ids, packed = self._heads.new_zeros(1), self._packed(0, 1)
        self._pack(ids, packed)
        self._unpack(packed, ids)

    def send(self, slot: int, block_ids: Tensor) -> None:
        """Pack ``block_ids`` (int64, on the cache's device) into ``slot`` and send it.

        The packing is issued on the current stream.
        """
        self._wait_for_last_use(slot)
        self._pack(block_ids, self._packed(slot, len(block_ids)))
        with self._transfer_stream(self._record_event()):
            wait = self._transport.send(slot, len(block_ids) * self._block_bytes)
            self._last_use[slot] = wait or self._record_event()

    def receive(self, slot: int, num_blocks: int) -> Wait:
        """Post the receive of ``num_blocks`` into ``slot``; returns a function that waits."""
        with self._transfer_stream(self._last_use[slot]):
            wait = self._transport.receive(slot, num_blocks * self._block_bytes)
            if wait is not None:
                return wait
            done = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
            done.record()
        self._filled[slot] = done
        return done.synchronize

    def unpack(self, slot: int, block_ids: Tensor) -> None:
        """Copy ``slot`` into ``block_ids``. The receive must be complete, as the host sees it."""
        if (filled := self._filled[slot]) is not None:
            torch.cuda.current_stream().wait_event(filled)
        if len(block_ids):
            self._unpack(self._packed(slot, len(block_ids)), block_ids)
        self._transport.release(slot)
        self._last_use[slot] = self._record_event()

    def _packed(self, slot: int, num_blocks: int) -> Tensor:
        # [num_blocks, num_layers, 2, block_size, len(heads), head_dim]
        flat = self._transport.staging[slot, : num_blocks * self._block_bytes]
        return flat.view(self._cache.dtype).view(num_blocks, *self._shape)

    def _pack(self, block_ids: Tensor, packed: Tensor) -> None:
        if self._on_gpu:
            from serve.comm.pack_kernels import pack

            pack(self._cache, block_ids, self._heads, packed)
        elif self._all_heads:
            torch.index_select(self._cache, 0, block_ids, out=packed)
        else:
            packed.copy_(self._cache[block_ids].index_select(4, self._heads))

    def _unpack(self, packed: Tensor, block_ids: Tensor) -> None:
        if self._on_gpu:
            from serve.comm.pack_kernels import unpack

            unpack(packed, block_ids, self._heads, self._cache)
        elif self._all_heads:
            self._cache.index_copy_(0, block_ids, packed)
        else:
            self._cache[block_ids[:, None], :, :, :, self._heads] = packed.movedim(4, 1)

    def _wait_for_last_use(self, slot: int) -> None:
        match self._last_use[slot]:
            case torch.cuda.Event() as event:
                torch.cuda.current_stream().wait_event(event)
            case None:
                pass
            case wait:
                wait()

    def _record_event(self) -> torch.cuda.Event | None:
        if not self._on_gpu:
            return None
        event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        event.record()
        return event

    def _transfer_stream(self, after: object) -> torch.cuda.StreamContext | nullcontext[None]:
        """Make the pair's stream current. It first waits for ``after``, if that is an event."""
        if self._stream is None:
            return nullcontext()
        if isinstance(after, torch.cuda.Event):
            self._stream.wait_event(after)
        return torch.cuda.stream(self._stream)


def packed_bytes(cache: Tensor, num_heads: int) -> int:
    """Return the bytes of ``num_heads`` heads of one block of ``cache`` (see ``Pair``)."""
    return cache[0].numel() // cache.shape[4] * num_heads * cache.itemsize


class KVSender:
    """Sends this rank's part of each push to decode replicas, over its pairs."""

    def __init__(self, pairs: dict[int, list[Pair]], device: torch.device) -> None:
        self._pairs = pairs  # by decode replica; absent if other ranks send all heads
        self._device = device
        # Packing has priority over the compute stream: a push is short, and its blocks are needed.
        self._stream = (
            torch.cuda.Stream(priority=-1)  # type: ignore[no-untyped-call]
            if device.type == "cuda"
            else None
        )
        if self._stream is not None:
            # Allocate the memory for block ids now. If the first push allocated it, the allocation
            # would wait for all work on the device.
            with torch.cuda.stream(self._stream):
                to_device(range(_MAX_WARM_BLOCKS), torch.int64, device)

    def send(self, decode_replica: int, number: int, block_ids: Sequence[int]) -> None:
        """Pack and send ``block_ids`` as push ``number``. Returns as soon as both are issued."""
        with nullcontext() if self._stream is None else torch.cuda.stream(self._stream):
            ids = to_device(block_ids, torch.int64, self._device)
            for pair in self._pairs.get(decode_replica, ()):
                pair.send(number % NUM_STAGING_SLOTS, ids)


class KVReceiver:
    """Receives this rank's part of each push from prefill replicas, over its pairs."""

    def __init__(self, pairs: dict[int, list[Pair]], device: torch.device) -> None:
        self._pairs = pairs  # by prefill replica
        self._device = device

    def post(self, prefill_replica: int, number: int, num_blocks: int) -> list[Wait]:
        """Post the receives of push ``number``. Returns functions that wait for them."""
        slot = number % NUM_STAGING_SLOTS
        return [pair.receive(slot, num_blocks) for pair in self._pairs.get(prefill_replica, ())]

    def unpack(self, prefill_replica: int, number: int, block_ids: Sequence[int]) -> None:
        """Copy push ``number`` into ``block_ids`` and free its slot. Empty ids drop the push."""
        ids = to_device(block_ids, torch.int64, self._device)
        for pair in self._pairs.get(prefill_replica, ()):
            pair.unpack(number % NUM_STAGING_SLOTS, ids)


def _widen(cache: Tensor) -> Tensor:
    """Return a view in elements of 8 bytes, because indexed copies cost time per element."""
    return cache.view(torch.int64) if cache.shape[-1] * cache.itemsize % 8 == 0 else cache
