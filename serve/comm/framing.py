"""Frames: the format of messages on a gloo connection, and the detection of its end.

A writer takes all messages that are queued for its peer and sends them together::

    frame, always FRAME_BYTES   | mark | body bytes | size, message | size, message | ... | zeros |
    and if the body is larger, a second gloo message with the rest of it, of exactly that size

The size of a frame is fixed because gloo aborts the process when a message is larger than the
posted buffer.

When a connection breaks, gloo fails the operations that wait for their counterpart. It does not
fail an operation that has received some of its bytes, so a reader in the middle of a body would
wait forever. Therefore a second receive with a tag of its own is always posted. It can only receive
the end mark of the peer's writer, and it fails as soon as the connection breaks.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence
from queue import Empty, SimpleQueue

import torch
import torch.distributed as dist
from torch import Tensor

FRAME_BYTES = 8192
MAX_BODY_BYTES = 1 << 30
# No more messages are added beyond this size, because the receiver handles a whole frame in one
# call on its event loop.
COALESCED_BYTES = 64 * 1024

_HEAD = struct.Struct("<4sQ")  # mark, bytes of the body
_SIZE = struct.Struct("<I")  # of one message
_MARK = b"SRV1"
_FRAME_TAG, _END_TAG = 0, 1

Outbox = SimpleQueue[bytes | None]  # messages for one peer; None ends the queue


def receive_bodies(group: dist.ProcessGroup, peer: int) -> Iterator[memoryview]:
    """Yield the bodies of the frames of ``peer``, each valid until the next. Blocks in between.

    Raises ``RuntimeError`` when the connection ends, ``ValueError`` if the data is not a frame.
    """
    frame = bytearray(FRAME_BYTES)
    tensor = as_tensor(frame)
    while True:
        dist.recv(tensor, peer, group, _FRAME_TAG)
        mark, body_bytes = _HEAD.unpack_from(frame)
        if mark != _MARK or not 0 < body_bytes <= MAX_BODY_BYTES:
            raise ValueError(f"not a frame: {bytes(frame[:16]).hex(' ')} ...")
        data = frame
        if _HEAD.size + body_bytes > FRAME_BYTES:
            data = bytearray(_HEAD.size + body_bytes)
            data[:FRAME_BYTES] = frame
            dist.recv(as_tensor(data)[FRAME_BYTES:], peer, group, _FRAME_TAG)
        yield memoryview(data)[_HEAD.size : _HEAD.size + body_bytes]


def await_end(group: dist.ProcessGroup, peer: int) -> None:
    """Block until ``write_queue`` ends at ``peer``. ``RuntimeError`` if the connection breaks."""
    dist.recv(as_tensor(bytearray(1)), peer, group, _END_TAG)


def write_queue(outbox: Outbox, group: dist.ProcessGroup, peer: int) -> None:
    """Send the messages of ``outbox`` until a None; those that are queued at once share a frame.

    Raises ``RuntimeError`` when the connection ends.
    """
    ending = False
    while not ending:
        messages, ending = take_queued(outbox)
        if messages:
            tensor = as_tensor(make_frame(messages))
            dist.send(tensor[:FRAME_BYTES], peer, group, _FRAME_TAG)
            if len(tensor) > FRAME_BYTES:
                dist.send(tensor[FRAME_BYTES:], peer, group, _FRAME_TAG)
    dist.send(as_tensor(bytearray(1)), peer, group, _END_TAG)


def take_queued(outbox: Outbox) -> tuple[list[bytes], bool]:
    """Wait for a message and take it with those queued behind it.

    Returns the messages, and whether the None that ends the queue was reached.
    """
    messages: list[bytes] = []
    num_bytes = 0
    data = outbox.get()
    while data is not None:
        messages.append(data)
        num_bytes += len(data)
        if num_bytes >= COALESCED_BYTES:
            return messages, False
        try:
            data = outbox.get_nowait()
        except Empty:
            return messages, False
    return messages, True


def make_frame(messages: Sequence[bytes]) -> bytearray:
    """Return the bytes of ``messages``: one frame, followed by the part that does not fit."""
    body_bytes = sum(_SIZE.size + len(message) for message in messages)
    if body_bytes > MAX_BODY_BYTES:
        raise ValueError(f"a message of {body_bytes} bytes exceeds {MAX_BODY_BYTES}")
    frame = bytearray(_HEAD.pack(_MARK, body_bytes))
    for message in messages:
        frame += _SIZE.pack(len(message))
        frame += message
    frame += bytes(max(0, FRAME_BYTES - len(frame)))
    return frame


def split_body(body: memoryview) -> Iterator[memoryview]:
    """Yield the messages in the body of a frame. ``ValueError`` if it is not valid."""
    start = 0
    while start < len(body):
        first = start + _SIZE.size
        if first > len(body) or (end := first + _SIZE.unpack_from(body, start)[0]) > len(body):
            raise ValueError("a message is longer than the frame that carries it")
        yield body[first:end]
        start = end


def as_tensor(buffer: bytearray) -> Tensor:
    """Return a uint8 tensor over the memory of ``buffer``."""
    return torch.frombuffer(buffer, dtype=torch.uint8)
