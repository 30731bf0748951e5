"""StagedCopies: copy tensors from files to a device, piece by piece through pinned buffers.

One core reads a memory-mapped file at a few GB/s, and a device accepts ten times as much. So
several threads fill buffers, and the calling thread alone copies them to the device.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

NUM_THREADS = 8
NUM_SLOTS = NUM_THREADS + 4
SLOT_BYTES = 16 << 20


@dataclass(eq=False, slots=True)
class _Slot:
    buffer: Tensor  # [slot_bytes], uint8; pinned if the device is a GPU
    sent: torch.cuda.Event | None = None  # the copy from this buffer to the device


@dataclass(frozen=True, slots=True)
class _Piece:
    slot: _Slot
    staged: Tensor  # view of the slot's buffer, shaped like the target
    target: Tensor
    filled: Future[Tensor]


class StagedCopies:
    """Copies in a ``with`` block, all complete when it ends. Not thread-safe."""

    def __init__(self, device: torch.device, slot_bytes: int = SLOT_BYTES) -> None:
        self._on_gpu = device.type == "cuda"
        self._slot_bytes = slot_bytes
        self._num_slots = 0
        self._free: deque[_Slot] = deque()  # oldest copy first
        self._filling: deque[_Piece] = deque()  # oldest first
        self._threads = ThreadPoolExecutor(NUM_THREADS, thread_name_prefix="load")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        try:
            while self._filling and kind is None:
                self._send_oldest()
        finally:
            self._threads.shutdown(cancel_futures=True)
            if self._on_gpu:
                torch.cuda.current_stream().synchronize()

    def add(self, target: Tensor, source: Tensor) -> None:
        """Copy ``source`` (on the CPU, of any type) to ``target``, which has the same shape.

        Returns before the copy is complete; ``source`` must not change until the block ends.
        """
        for part, piece in self._pieces(target, source):
            slot = self._take_slot()
            staged = slot.buffer[: part.nbytes].view(part.dtype).view(part.shape)
            filled = self._threads.submit(staged.copy_, piece)
            self._filling.append(_Piece(slot, staged, part, filled))

    def _take_slot(self) -> _Slot:
        if self._num_slots < NUM_SLOTS:
            self._num_slots += 1
            size = self._slot_bytes
            return _Slot(torch.empty(size, dtype=torch.uint8, pin_memory=self._on_gpu))
        if not self._free:
            self._send_oldest()
        slot = self._free.popleft()
        if slot.sent is not None:
            slot.sent.synchronize()
        return slot

    def _pieces(self, target: Tensor, source: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield matching parts of both that fit in a slot: runs of rows, or parts of large rows."""
        if target.nbytes <= self._slot_bytes:
            yield target, source
        elif (row_bytes := target[0].nbytes) > self._slot_bytes:
            for row, source_row in zip(target, source, strict=True):
                yield from self._pieces(row, source_row)
        else:
            count = self._slot_bytes // row_bytes
            parts, pieces = torch.split(target, count), torch.split(source, count)
            yield from zip(parts, pieces, strict=True)

    def _send_oldest(self) -> None:
        piece = self._filling.popleft()
        piece.filled.result()  # raises the thread's exception
        with torch.no_grad():
            piece.target.copy_(piece.staged, non_blocking=self._on_gpu)
        if self._on_gpu:
            piece.slot.sent = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
            piece.slot.sent.record()
        self._free.append(piece.slot)
