"""ControlChannel: messages between this rank and its peers, in order, over gloo.

Each peer has a reader thread, blocked in a receive that names its source, and a writer thread with
a queue. They own no state: what they receive goes to the event loop (plan entries straight to the
GPU queue), and its loss is reported there. A send completes only when the peer's receive is posted,
so with one writer for all a stopped peer would hold up what is meant for the others; hence a writer
for each.

On the wire, everything that is queued for a peer when its writer gets to it::

    frame, always FRAME_BYTES   | mark | body bytes | size, message | size, message | ... | zeros |
    and if the body is larger, a second message with the rest of it, of exactly that size

gloo aborts the process when a message is larger than the posted buffer; hence the fixed size.

The life of a connection::

    open --Goodbye received--> departed    its reader ends; it still reads until it has ours
      |
      +----closed, or not understood-----> lost    on_lost, once
"""

from __future__ import annotations

import asyncio
import logging
import struct
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from queue import Empty, SimpleQueue

import torch
import torch.distributed as dist
from torch import Tensor

from serve.comm.messages import AnyMessage, Entry, Goodbye, decode, encode

log = logging.getLogger(__name__)

FRAME_BYTES = 8192
MAX_BODY_BYTES = 1 << 30
# Past this a frame takes no more: the receiver handles a frame in one go on its event loop.
COALESCED_BYTES = 64 * 1024

_HEAD = struct.Struct("<4sQ")  # mark, bytes of the body
_SIZE = struct.Struct("<I")  # of one message
_MARK = b"SRV1"


class ControlChannel:
    """Sends to and receives from ``peers``; everything is called on ``loop`` but ``on_entry``.

    ``on_message(source, message)`` gets what peers send, in each one's order, and what is sent to
    oneself. ``on_lost(peer, reason)`` is called once for a peer whose connection ends before its
    Goodbye. With ``on_entry`` plan entries go there instead, in the reader's thread. ``group``
    holds all ranks and is used by nobody else.
    """

    def __init__(
        self,
        rank: int,
        peers: Sequence[int],
        group: dist.ProcessGroup,
        loop: asyncio.AbstractEventLoop,
        *,
        on_message: Callable[[int, AnyMessage], None],
        on_lost: Callable[[int, str], None],
        on_entry: Callable[[Entry], None] | None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._rank = rank
        self._group = group
        self._loop = loop
        self._on_message = on_message
        self._on_lost = on_lost
        self._on_entry = on_entry
        self._clock = clock
        self._outboxes: dict[int, SimpleQueue[bytes | None]] = {
            peer: SimpleQueue() for peer in peers
        }
        self._open = set(peers)  # those that may still be heard of
        self._leaving = False
        self._num_threads = 2 * len(self._outboxes)
        self._ended = asyncio.Event()
        self.last_heard_s: dict[int, float] = {}  # by peer, the time of its last frame

    def start(self) -> None:
        """Start to read and write. What was sent before goes out now."""
        if not self._num_threads:
            self._ended.set()
        for peer in self._outboxes:
            self.last_heard_s[peer] = self._clock()
            for name, run in (("reader", self._read), ("writer", self._write)):
                threading.Thread(
                    target=run, args=(peer,), name=f"{name}-{peer}", daemon=True
                ).start()

    def send(self, rank: int, message: AnyMessage) -> None:
        """Queue ``message`` for ``rank``; never blocks. ``ValueError`` if it is not a peer.

        What is sent to a lost peer, or after ``goodbye``, goes nowhere.
        """
        if rank == self._rank:
            self._loop.call_soon(self._deliver, rank, [message])
            return
        outbox = self._outboxes.get(rank)
        if outbox is None:
            raise ValueError(f"rank {rank} is not a control peer of rank {self._rank}")
        if not self._leaving:
            outbox.put(encode(message))

    def goodbye(self) -> None:
        """Say Goodbye to all peers, after what is queued; nothing is sent any more."""
        if self._leaving:
            return
        self._leaving = True
        for outbox in self._outboxes.values():
            outbox.put(encode(Goodbye(self._rank)))
            outbox.put(None)

    async def closed(self) -> None:
        """Wait until every peer has said Goodbye or is lost, and all that was queued is out."""
        await self._ended.wait()

    def silent_peers(self, limit_s: float) -> list[int]:
        """The open peers not heard of for longer than ``limit_s``, the most silent first."""
        now = self._clock()
        heard = self.last_heard_s
        silent = [peer for peer in self._open if now - heard.get(peer, now) > limit_s]
        return sorted(silent, key=lambda peer: (heard[peer], peer))

    # --- on the event loop ----------------------------------------------------------------------

    def _deliver(self, source: int, messages: list[AnyMessage]) -> None:
        for message in messages:
            self._on_message(source, message)

    def _lose(self, peer: int, reason: str) -> None:
        if peer in self._open:
            self._open.remove(peer)
            self._outboxes[peer].put(None)
            self._on_lost(peer, reason)

    def _end_thread(self) -> None:
        self._num_threads -= 1
        if not self._num_threads:
            self._ended.set()

    # --- in the threads of one peer -------------------------------------------------------------

    def _read(self, peer: int) -> None:
        try:
            for body in receive_bodies(self._group, peer):
                self.last_heard_s[peer] = self._clock()
                messages = [decode(data) for data in split_body(body)]
                self._take(peer, messages)
                if any(isinstance(message, Goodbye) for message in messages):
                    self._post(self._open.discard, peer)
                    break
        except BaseException as error:  # whatever it is, this peer is heard no more
            self._post(self._lose, peer, describe(error))
        self._post(self._end_thread)

    def _write(self, peer: int) -> None:
        try:
            write_queue(self._outboxes[peer], self._group, peer)
        except RuntimeError as error:
            # The connection is gone. Its reader sees that too, and it alone knows whether the peer
            # had said Goodbye.
            log.debug("sending to rank %d: %s", peer, describe(error))
        except BaseException as error:
            self._post(self._lose, peer, describe(error))
        self._post(self._end_thread)

    def _take(self, source: int, messages: list[AnyMessage]) -> None:
        """Pass a frame on: entries at once, the rest in one call on the loop."""
        if self._on_entry is None:
            self._post(self._deliver, source, messages)
            return
        rest: list[AnyMessage] = []
        for message in messages:
            if isinstance(message, Entry):
                self._on_entry(message)
            else:
                rest.append(message)
        if rest:
            self._post(self._deliver, source, rest)

    def _post(self, callback: Callable[..., None], *args: object) -> None:
        try:
            self._loop.call_soon_threadsafe(callback, *args)
        except RuntimeError:
            if not self._loop.is_closed():  # then the process is ending, with nobody left to tell
                raise


def describe(error: BaseException) -> str:
    """The error in one line, without the place in gloo's sources that it starts with."""
    text = " ".join(str(error).split())
    if isinstance(error, RuntimeError):
        return text.partition("] ")[2] if text.startswith("[") else text
    return f"{type(error).__name__}: {text}"


# --- frames -------------------------------------------------------------------------------------


def make_frame(messages: Sequence[bytes]) -> bytearray:
    """The bytes that carry ``messages``: a frame, and what does not fit into it after it."""
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
    """The messages in the body of a frame. ``ValueError`` if it is not made of them."""
    start = 0
    while start < len(body):
        first = start + _SIZE.size
        if first > len(body) or (end := first + _SIZE.unpack_from(body, start)[0]) > len(body):
            raise ValueError("a message is longer than the frame that carries it")
        yield body[first:end]
        start = end


def receive_bodies(group: dist.ProcessGroup, peer: int) -> Iterator[memoryview]:
    """The bodies of the frames of ``peer``, each valid until the next. Blocks in between.

    ``RuntimeError`` when the connection ends, ``ValueError`` for what is not a frame.
    """
    frame = bytearray(FRAME_BYTES)
    tensor = as_tensor(frame)
    while True:
        dist.recv(tensor, peer, group)
        mark, body_bytes = _HEAD.unpack_from(frame)
        if mark != _MARK or not 0 < body_bytes <= MAX_BODY_BYTES:
            raise ValueError(f"not a frame: {bytes(frame[:16]).hex(' ')} ...")
        whole = frame
        if _HEAD.size + body_bytes > FRAME_BYTES:
            whole = bytearray(_HEAD.size + body_bytes)
            whole[:FRAME_BYTES] = frame
            dist.recv(as_tensor(whole)[FRAME_BYTES:], peer, group)
        yield memoryview(whole)[_HEAD.size : _HEAD.size + body_bytes]


def write_queue(outbox: SimpleQueue[bytes | None], group: dist.ProcessGroup, peer: int) -> None:
    """Send what comes out of ``outbox``, as much at a time as is there, until a None.

    ``RuntimeError`` when the connection ends.
    """
    ending = False
    while not ending:
        messages, ending = take_queued(outbox)
        if messages:
            tensor = as_tensor(make_frame(messages))
            works = [dist.isend(tensor[:FRAME_BYTES], peer, group)]
            if len(tensor) > FRAME_BYTES:
                works.append(dist.isend(tensor[FRAME_BYTES:], peer, group))
            for work in works:
                if work is None:
                    raise ValueError(f"this rank is not in the group of rank {peer}")
                work.wait()


def take_queued(outbox: SimpleQueue[bytes | None]) -> tuple[list[bytes], bool]:
    """Wait for a message and take those behind it; whether the end of the queue was reached."""
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


def as_tensor(buffer: bytearray) -> Tensor:
    """``buffer`` as a tensor over the same memory, uint8."""
    return torch.frombuffer(buffer, dtype=torch.uint8)
