"""ControlChannel: ordered messages between this rank and its peers, over gloo.

Each peer has three threads. The reader is blocked in a receive from this peer, the watcher in a
receive that only ends with the connection (see ``serve.comm.framing``), the writer on a queue. The
threads own no state. They pass messages and errors to the event loop, and plan entries straight to
the GPU thread's queue. A send completes only when the peer has posted its receive. With one writer
for all peers, a stopped peer would block the messages to the others, so each has its own.

The states of a connection::

    open --Goodbye received--> closing    the writer still runs until our Goodbye is sent
      |
      +--connection closed, or a frame is not valid--> lost    on_lost is called once;
                                                               the threads may never end
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Sequence
from queue import SimpleQueue

import torch.distributed as dist

from serve.comm.framing import Outbox, await_end, receive_bodies, split_body, write_queue
from serve.protocol.messages import AnyMessage, Goodbye, decode, encode
from serve.protocol.plan import Entry


class ControlChannel:
    """Exchanges messages with ``peers``. Methods and callbacks run on ``loop``.

    ``on_message(source, message)`` is called for each message, in the order of each sender, and for
    messages that this rank sends to itself. ``on_lost(peer, reason)`` is called once for a peer
    whose connection ends before its Goodbye. If there is an ``on_entry``, it is called for plan
    entries instead, in the reader's thread. ``group`` holds all ranks and has no other user.
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
        self._open = set(peers)  # neither lost nor past their Goodbye
        self._num_threads = dict.fromkeys(peers, 3)  # running threads, of peers not yet closed
        self._goodbye_sent = False
        self._all_closed = asyncio.Event()
        self.last_received_s: dict[int, float] = {}  # by peer, the time of its last frame

    def start(self) -> None:
        """Start the threads. Messages that were queued before are sent now."""
        if not self._num_threads:
            self._all_closed.set()
        for peer in self._outboxes:
            self.last_received_s[peer] = self._clock()
            for name, run in (("read", self._read), ("watch", self._watch), ("write", self._write)):
                self._start_thread(f"{name}-{peer}", run, peer)

    def send(self, rank: int, message: AnyMessage) -> None:
        """Queue ``message`` for ``rank``; never blocks. ``ValueError`` if it is not a peer.

        A message to a lost peer, or after ``send_goodbye``, is dropped.
        """
        if rank == self._rank:
            self._loop.call_soon(self._deliver, rank, [message])
            return
        outbox = self._outboxes.get(rank)
        if outbox is None:
            raise ValueError(f"rank {rank} is not a control peer of rank {self._rank}")
        if not self._goodbye_sent:
            outbox.put(encode(message))

    def send_goodbye(self) -> None:
        """Send Goodbye to all peers after the queued messages. Later messages are dropped."""
        if self._goodbye_sent:
            return
        self._goodbye_sent = True
        for outbox in self._outboxes.values():
            outbox.put(encode(Goodbye(self._rank)))
            outbox.put(None)

    async def wait_closed(self) -> None:
        """Wait until every peer has sent Goodbye or is lost, and all queued messages are sent."""
        await self._all_closed.wait()

    def silent_peers(self, limit_s: float) -> list[int]:
        """Return open peers with no frame for longer than ``limit_s``, the longest silent first."""
        now = self._clock()
        received_s = self.last_received_s
        silent = [peer for peer in self._open if now - received_s.get(peer, now) > limit_s]
        return sorted(silent, key=lambda peer: (received_s[peer], peer))

    def unclosed_peers(self) -> list[int]:
        """Return the peers that ``wait_closed`` waits for."""
        return sorted(self._num_threads)

    def restart_clocks(self) -> None:
        """Count no silence before now, because this whole process did not run for a while."""
        self.last_received_s = dict.fromkeys(self.last_received_s, self._clock())

    # --- on the event loop ----------------------------------------------------------------------

    def _deliver(self, source: int, messages: list[AnyMessage]) -> None:
        for message in messages:
            self._on_message(source, message)

    def _on_thread_error(self, peer: int, reason: str) -> None:
        if peer in self._open:
            self._open.remove(peer)
            self._outboxes[peer].put(None)
            self._on_lost(peer, reason)
        # Its other threads may be stuck in gloo, also when the error came after its Goodbye. So
        # they are not waited for.
        self._close_peer(peer)

    def _on_thread_end(self, peer: int) -> None:
        if peer in self._num_threads:
            self._num_threads[peer] -= 1
            if not self._num_threads[peer]:
                self._close_peer(peer)

    def _close_peer(self, peer: int) -> None:
        self._num_threads.pop(peer, None)
        if not self._num_threads:
            self._all_closed.set()

    # --- in the threads of one peer -------------------------------------------------------------

    def _start_thread(self, name: str, run: Callable[[int], None], peer: int) -> None:
        def run_and_report() -> None:
            try:
                run(peer)
            except BaseException as error:  # any error makes the connection unusable
                self._post(self._on_thread_error, peer, describe_error(error))
            else:
                self._post(self._on_thread_end, peer)

        threading.Thread(target=run_and_report, name=name, daemon=True).start()

    def _read(self, peer: int) -> None:
        for body in receive_bodies(self._group, peer):
            self.last_received_s[peer] = self._clock()
            messages = [decode(data) for data in split_body(body)]
            self._dispatch(peer, messages)
            if any(isinstance(message, Goodbye) for message in messages):
                self._post(self._open.discard, peer)
                break

    def _watch(self, peer: int) -> None:
        await_end(self._group, peer)

    def _write(self, peer: int) -> None:
        write_queue(self._outboxes[peer], self._group, peer)

    def _dispatch(self, source: int, messages: list[AnyMessage]) -> None:
        """Pass on a frame's messages: entries at once, the rest in one call on the loop."""
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
            if not self._loop.is_closed():  # a closed loop means that the process is ending
                raise


def describe_error(error: BaseException) -> str:
    """Describe ``error`` in one line, without gloo's source location and advice."""
    text = " ".join(str(error).split())
    if not isinstance(error, RuntimeError):
        return f"{type(error).__name__}: {text}"
    if text.startswith("["):
        text = text.partition("] ")[2]
    return text.partition(". This is typically")[0]
