"""ControlChannel: ordered messages between this rank and its peers, over gloo.

Each peer has three threads. Its reader is blocked in a receive that names its source, its watcher
in one that only fails (see ``serve.comm.framing``), its writer on a queue. They own no state: what
they receive goes to the event loop (plan entries straight to the GPU queue), and so does what ends
them. A send completes only when the peer's receive is posted, so with one writer for all a stopped
peer would hold up what is meant for the others.

The life of a connection::

    open --Goodbye received--> departed    it still reads until it has our Goodbye
      |
      +----closed, or not understood-----> lost    on_lost, once; its threads may never end
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Sequence
from queue import SimpleQueue

import torch.distributed as dist

from serve.comm.framing import Outbox, await_end, receive_bodies, split_body, write_queue
from serve.protocol.messages import AnyMessage, Entry, Goodbye, decode, encode


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
        self._outboxes: dict[int, Outbox] = {peer: SimpleQueue() for peer in peers}
        self._open = set(peers)  # those that may still be heard of
        self._num_threads = dict.fromkeys(peers, 3)  # of peers that have not ended
        self._leaving = False
        self._ended = asyncio.Event()
        self.last_heard_s: dict[int, float] = {}  # by peer, the time of its last frame

    def start(self) -> None:
        """Start to read and write. What was sent before goes out now."""
        if not self._num_threads:
            self._ended.set()
        for peer in self._outboxes:
            self.last_heard_s[peer] = self._clock()
            for name, run in (("read", self._read), ("watch", self._watch), ("write", self._write)):
                self._start_thread(f"{name}-{peer}", run, peer)

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
        # Also if it broke after its Goodbye: its other threads may be stuck in gloo.
        self._end(peer)

    def _end_thread(self, peer: int) -> None:
        if peer in self._num_threads:
            self._num_threads[peer] -= 1
            if not self._num_threads[peer]:
                self._end(peer)

    def _end(self, peer: int) -> None:
        self._num_threads.pop(peer, None)
        if not self._num_threads:
            self._ended.set()

    # --- in the threads of one peer -------------------------------------------------------------

    def _start_thread(self, name: str, run: Callable[[int], None], peer: int) -> None:
        def run_to_end() -> None:
            try:
                run(peer)
            except BaseException as error:  # whatever it is, this peer is of no use any more
                self._post(self._lose, peer, describe(error))
            else:
                self._post(self._end_thread, peer)

        threading.Thread(target=run_to_end, name=name, daemon=True).start()

    def _read(self, peer: int) -> None:
        for body in receive_bodies(self._group, peer):
            self.last_heard_s[peer] = self._clock()
            messages = [decode(data) for data in split_body(body)]
            self._take(peer, messages)
            if any(isinstance(message, Goodbye) for message in messages):
                self._post(self._open.discard, peer)
                break

    def _watch(self, peer: int) -> None:
        await_end(self._group, peer)

    def _write(self, peer: int) -> None:
        write_queue(self._outboxes[peer], self._group, peer)

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
    """The error in one line; of gloo's, what happened without where in its sources and advice."""
    text = " ".join(str(error).split())
    if not isinstance(error, RuntimeError):
        return f"{type(error).__name__}: {text}"
    if text.startswith("["):
        text = text.partition("] ")[2]
    return text.partition(". This is typically")[0]
