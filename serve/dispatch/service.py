"""Service: submit requests and read their streams, for HTTP handlers and the offline interface."""

from __future__ import annotations

import asyncio
import logging
from array import array
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from io import StringIO
from typing import Any

from msgspec.structs import replace

from serve.dispatch.admission import TooManyWaiting
from serve.dispatch.dispatcher import Dispatcher, Outgoing
from serve.dispatch.metrics import Metrics
from serve.dispatch.output import Output
from serve.protocol.messages import AnyMessage, Report
from serve.request import FinishReason, Request

__all__ = ["Output", "Overloaded", "Service", "Stream", "Unavailable", "read_all"]

log = logging.getLogger(__name__)

MAX_UNREAD = 64  # outputs kept apart for a slow reader; one more, and they are joined
RETRY_WHEN_FULL_S = 1.0
RETRY_WHEN_DOWN_S = 5.0


class Overloaded(Exception):
    """Too many requests wait. The client may try again after ``retry_after_s`` seconds."""

    def __init__(self, message: str, retry_after_s: float = RETRY_WHEN_FULL_S) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class Unavailable(Exception):
    """The server is starting or draining. ``reason`` says which."""

    def __init__(self, reason: str, retry_after_s: float = RETRY_WHEN_DOWN_S) -> None:
        super().__init__(reason)
        self.reason = reason
        self.retry_after_s = retry_after_s


class _Backlog:
    """Unread outputs, joined. Adding costs what is added, however much is there."""

    def __init__(self, first_index: int) -> None:
        self.first_index = first_index
        self.token_ids = array("i")
        self.text = StringIO()

    def add(self, outputs: Sequence[Output]) -> None:
        """Join ``outputs``, in order."""
        for output in outputs:
            self.token_ids.extend(output.token_ids)
            self.text.write(output.text)


class Stream:
    """The outputs of one request, for one reader. It ends after the first ``finish_reason``.

    Outputs that a slow reader has not taken are joined into one.
    """

    def __init__(self, request: Request) -> None:
        self.request = request
        self.num_tokens = 0  # received so far, read or not
        self._backlog: _Backlog | None = None  # unread outputs before those in ``_unread``
        self._unread: list[Output] = []
        self._ended = False
        self._changed = asyncio.Event()

    def put(self, output: Output) -> None:
        """Add an output. Ignore it if the stream has ended."""
        if self._ended:
            return
        self._ended = output.finish_reason is not None
        self.num_tokens += len(output.token_ids)
        # Join them, so that a reader that stopped does not collect an object for every token.
        if len(self._unread) == MAX_UNREAD:
            if self._backlog is None:
                self._backlog = _Backlog(self._unread[0].first_index)
            self._backlog.add(self._unread)
            self._unread = []
        self._unread.append(output)
        self._changed.set()

    @property
    def exhausted(self) -> bool:
        """Whether the last output has been read."""
        return self._ended and not self._unread

    def take(self) -> Output | None:
        """Return all unread outputs joined into one, or None if there are none."""
        unread, self._unread = self._unread, []
        if self._backlog is None and len(unread) < 2:
            return unread[0] if unread else None
        backlog, self._backlog = self._backlog or _Backlog(unread[0].first_index), None
        backlog.add(unread)
        return replace(
            unread[-1],
            first_index=backlog.first_index,
            token_ids=tuple(backlog.token_ids),
            text=backlog.text.getvalue(),
        )

    def signal(self, changed: asyncio.Event) -> None:
        """Set ``changed`` at every new output, instead of the stream's own event."""
        self._changed = changed

    async def __aiter__(self) -> AsyncIterator[Output]:
        async for batch in read_all([self]):
            yield batch[0][1]


async def read_all(streams: Sequence[Stream]) -> AsyncIterator[list[tuple[int, Output]]]:
    """Yield the new outputs of ``streams``, each with its stream's index, until all have ended."""
    changed = asyncio.Event()
    changed.set()  # there may be outputs already
    for stream in streams:
        stream.signal(changed)
    if len(streams) == 1:  # the common case, which needs no bookkeeping
        only = streams[0]
        while not only.exhausted:
            await changed.wait()
            changed.clear()
            if (output := only.take()) is not None:
                yield [(0, output)]
        return
    reading = {i: stream for i, stream in enumerate(streams) if not stream.exhausted}
    while reading:
        await changed.wait()
        changed.clear()
        batch = []
        for index, stream in reading.items():
            if (output := stream.take()) is not None:
                batch.append((index, output))
        for index, output in batch:
            if output.finish_reason is not None:
                del reading[index]
        if batch:
            yield batch


class Service:
    """Connects requests with their streams. Used on the event loop of rank 0."""

    def __init__(
        self,
        dispatcher: Dispatcher,
        send: Callable[[int, AnyMessage], None],
        metrics: Metrics,
        clock: Callable[[], float],
    ) -> None:
        self.max_model_len = 0  # known once ready
        self.draining = False
        self.ready = False
        self._dispatcher = dispatcher
        self._send = send
        self._metrics = metrics
        self._clock = clock
        self._streams: dict[str, Stream] = {}
        self._idle = asyncio.Event()
        self._idle.set()

    @property
    def num_active(self) -> int:
        """Requests that have not ended."""
        return self._dispatcher.num_active

    @property
    def max_waiting(self) -> int:
        """How many active requests may lack a first token. ``submit`` never accepts more."""
        return self._dispatcher.limits.max_requests

    @property
    def max_waiting_tokens(self) -> int:
        """How many prompt tokens they may have. ``submit`` accepts more only in a single prompt."""
        return self._dispatcher.limits.max_tokens

    def set_ready(
        self, max_model_len: int, block_size: int = 0, num_blocks: Mapping[int, int] | None = None
    ) -> None:
        """Accept requests from now on: every replica is ready.

        A context holds up to ``max_model_len`` tokens. ``block_size`` (in tokens) and
        ``num_blocks`` (by replica id) are for the metrics only.
        """
        self.max_model_len = max_model_len
        self.ready = True
        for replica_id, count in (num_blocks or {}).items():
            self._metrics.on_ready(replica_id, count, block_size)

    def start_draining(self) -> None:
        """Refuse new requests from now on."""
        self.draining = True

    async def drained(self) -> None:
        """Wait until no request is active."""
        await self._idle.wait()

    def check_open(self) -> None:
        """Raise ``Unavailable`` if no requests are accepted now."""
        if self.draining:
            raise Unavailable("the server is shutting down")
        if not self.ready:
            raise Unavailable("the server is starting")

    def submit(self, requests: Sequence[Request], client: str = "") -> list[Stream]:
        """Accept all of ``requests`` or, raising ``Overloaded`` or ``Unavailable``, none.

        ``client`` names whose share of the queue they take, for example by a hash of its key.
        Raises ``ValueError`` if two of them, or one and an active request, have the same id.
        """
        self.check_open()
        ids = {request.id for request in requests}
        if len(ids) < len(requests) or not ids.isdisjoint(self._streams):
            raise ValueError("a request with this id is active")
        try:
            outgoing = self._dispatcher.dispatch(requests, client)
        except TooManyWaiting as error:
            self._metrics.on_rejected("overloaded", len(requests))
            raise Overloaded(str(error)) from None
        streams = [Stream(request) for request in requests]
        now_s = self._clock()
        for stream in streams:
            self._streams[stream.request.id] = stream
            self._metrics.on_accepted(stream.request, now_s)
            self._idle.clear()
        self._send_all(outgoing)
        return streams

    def abort(self, request_id: str) -> None:
        """Stop a request on every replica. Ignore unknown and ended ones."""
        outgoing = self._dispatcher.close(request_id)
        if not outgoing:
            return
        self._pass_on(
            Output(
                request_id=request_id,
                first_index=self._streams[request_id].num_tokens,
                token_ids=(),
                text="",
                finish_reason=FinishReason.ABORT,
            )
        )
        self._send_all(outgoing)

    def on_report(self, report: Report, offset_s: float = 0.0) -> None:
        """Pass the tokens in a replica's report on to the streams."""
        outputs, outgoing = self._dispatcher.on_report(report, offset_s)
        self._metrics.on_report(report)
        for output in outputs:
            if output.request_id not in self._streams:  # it has failed with an earlier output
                continue
            try:
                self._pass_on(output)
            except Exception:
                log.exception("request %s failed", output.request_id)
                self._fail(output.request_id)
        self._send_all(outgoing)

    def _fail(self, request_id: str) -> None:
        """End one request whose output could not be passed on. The others are not concerned."""
        self._send_all(self._dispatcher.close(request_id))
        if (stream := self._streams.get(request_id)) is not None:
            self._end(stream)
            self._metrics.forget(request_id)
            stream.put(
                Output(
                    request_id=request_id,
                    first_index=stream.num_tokens,
                    token_ids=(),
                    text="",
                    finish_reason=FinishReason.ERROR,
                    error="the server failed to pass on this answer",
                )
            )

    def fail_all(self, reason: str) -> None:
        """End every stream with an error and accept no more requests."""
        self.draining = True
        for output in self._dispatcher.fail_all(reason):
            self._pass_on(output)

    def cluster(self) -> list[dict[str, Any]]:
        """Return the replicas as ``GET /cluster`` shows them."""
        return self._dispatcher.cluster()

    def _pass_on(self, output: Output) -> None:
        stream = self._streams[output.request_id]
        self._metrics.on_output(output, self._clock())
        stream.put(output)
        if output.finish_reason is not None:
            self._end(stream)

    def _end(self, stream: Stream) -> None:
        del self._streams[stream.request.id]
        if not self._streams:
            self._idle.set()

    def _send_all(self, outgoing: Sequence[Outgoing]) -> None:
        for rank, message in outgoing:
            self._send(rank, message)
