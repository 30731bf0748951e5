"""KV blocks through staging buffers between ranks: pack, send, receive, unpack.

Packing has a stream of its own: a push goes when its blocks are computed, not when the steps
before it on the compute stream have ended, which on a busy prefill rank are whole prompts. What it
reads is complete, for the leader has seen the result of the step that wrote it, and on its
followers the last all-reduce of that step comes after their writing; and it stays, for blocks are
freed only when the push is acknowledged. Unpacking is on the compute stream in plan order, so every
writer of KV blocks is on one stream. Sends and receives run on a stream of their own per directed
pair of ranks (GPU), or in gloo's threads (CPU). A staging slot passes between them by events::

    sender    sent[slot] -> pack (packing) -> packed -> send (pair) -> sent[slot]
    receiver  unpacked[slot] -> receive (pair) -> filled[slot] -> unpack (compute) -> unpacked[slot]

A push is sent only once the one before it in its slot is acknowledged, which the receiver does when
it is in the slot: so none of these waits is longer than the steps that are under way.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext

import torch
from torch import Tensor

from serve.comm.transports import Transport, Wait
from serve.device import to_device
from serve.protocol.messages import NUM_STAGING_SLOTS

_MAX_WARM_BLOCKS = 1 << 14  # block ids of a push


class Pair:
    """One directed pair of ranks, seen from one of them: its wire, its stream, its slots' state.

    ``heads`` are the positions, in this rank's layout, of the heads that travel on it, in the order
    of the packed form: ``[num_blocks, num_layers, 2, block_size, len(heads), head_dim]``.
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
        self._free: list[Wait | torch.cuda.Event | None] = [None] * NUM_STAGING_SLOTS
        self._filled: list[torch.cuda.Event | None] = [None] * NUM_STAGING_SLOTS

    def warm_up(self) -> None:
        """Use pack and unpack once: block 0 goes into this rank's own slot and back."""
        ids, packed = self._heads.new_zeros(1), self._packed(0, 1)
        self._pack(ids, packed)
        self._unpack(packed, ids)

    def send(self, slot: int, block_ids: Tensor) -> None:
        """Pack ``block_ids`` (int64, on the cache's device) into ``slot`` and send it.

        Packs on the current stream.
        """
        self._await_free(slot)
        self._pack(block_ids, self._packed(slot, len(block_ids)))
        with self._transfer_stream(self._mark()):
            wait = self._transport.send(slot, len(block_ids) * self._block_bytes)
            self._free[slot] = wait or self._mark()

    def receive(self, slot: int, num_blocks: int) -> Wait:
        """Post the receive of ``num_blocks`` blocks into ``slot``; the result waits for it."""
        with self._transfer_stream(self._free[slot]):
            wait = self._transport.receive(slot, num_blocks * self._block_bytes)
            if wait is not None:
                return wait
            done = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
            done.record()
        self._filled[slot] = done
        return done.synchronize

    def unpack(self, slot: int, block_ids: Tensor) -> None:
        """Copy what is in ``slot`` into ``block_ids``. Only after the receive is done."""
        if (filled := self._filled[slot]) is not None:
            torch.cuda.current_stream().wait_event(filled)
        if len(block_ids):
            self._unpack(self._packed(slot, len(block_ids)), block_ids)
        self._transport.release(slot)
        self._free[slot] = self._mark()

    def _packed(self, slot: int, num_blocks: int) -> Tensor:
        """The packed form in ``slot``."""
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

    def _await_free(self, slot: int) -> None:
        match self._free[slot]:
            case torch.cuda.Event() as event:
                torch.cuda.current_stream().wait_event(event)
            case None:
                pass
            case wait:
                wait()

    def _mark(self) -> torch.cuda.Event | None:
        if not self._on_gpu:
            return None
        event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        event.record()
        return event

    def _transfer_stream(self, after: object) -> torch.cuda.StreamContext | nullcontext[None]:
        """Issue on the pair's stream, once ``after`` (an event of another stream) is past."""
        if self._stream is None:
            return nullcontext()
        if isinstance(after, torch.cuda.Event):
            self._stream.wait_event(after)
        return torch.cuda.stream(self._stream)


def packed_bytes(cache: Tensor, num_heads: int) -> int:
    """Bytes that ``num_heads`` heads of one block of ``cache`` (see ``Pair``) take."""
    return cache[0].numel() // cache.shape[4] * num_heads * cache.itemsize


class KVSender:
    """Sends pushes to decode replicas: this rank's part of each, over its pairs."""

    def __init__(self, pairs: dict[int, list[Pair]], device: torch.device) -> None:
        self._pairs = pairs  # by decode replica; none where other ranks have all the heads
        self._device = device
        # Before the compute stream's: a push is short, and its memory is wanted.
        self._stream = (
            torch.cuda.Stream(priority=-1)  # type: ignore[no-untyped-call]
            if device.type == "cuda"
            else None
        )
        if self._stream is not None:
            # Taken from the device by the first push it would wait for all that runs there.
            with torch.cuda.stream(self._stream):
                to_device(range(_MAX_WARM_BLOCKS), torch.int64, device)

    def send(self, decode_replica: int, number: int, block_ids: Sequence[int]) -> None:
        """Pack and send ``block_ids`` as push ``number``; returns once it is issued."""
        with nullcontext() if self._stream is None else torch.cuda.stream(self._stream):
            ids = to_device(block_ids, torch.int64, self._device)
            for pair in self._pairs.get(decode_replica, ()):
                pair.send(number % NUM_STAGING_SLOTS, ids)


class KVReceiver:
    """Receives pushes of prefill replicas: this rank's part of each, over its pairs."""

    def __init__(self, pairs: dict[int, list[Pair]], device: torch.device) -> None:
        self._pairs = pairs  # by prefill replica
        self._device = device

    def post(self, prefill_replica: int, number: int, num_blocks: int) -> list[Wait]:
        """Post the receives of push ``number``; what is returned waits for each."""
        slot = number % NUM_STAGING_SLOTS
        return [pair.receive(slot, num_blocks) for pair in self._pairs.get(prefill_replica, ())]

    def unpack(self, prefill_replica: int, number: int, block_ids: Sequence[int]) -> None:
        """Copy push ``number`` into ``block_ids`` (empty: drop it) and free its slot."""
        ids = to_device(block_ids, torch.int64, self._device)
        for pair in self._pairs.get(prefill_replica, ()):
            pair.unpack(number % NUM_STAGING_SLOTS, ids)


def _widen(cache: Tensor) -> Tensor:
    """The same memory in elements of 8 bytes: indexed copies cost by the element."""
    return cache.view(torch.int64) if cache.shape[-1] * cache.itemsize % 8 == 0 else cache
