"""What HTTP handlers and the offline interface talk to: submit requests, read their streams."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any

from msgspec.structs import replace

from serve.comm.messages import AnyMessage, Report
from serve.dispatch.dispatcher import Dispatcher, Outgoing, TooManyWaiting
from serve.dispatch.output import Output
from serve.metrics import Metrics
from serve.request import FinishReason, Request

__all__ = ["Output", "Overloaded", "Service", "Stream", "Unavailable"]

RETRY_WHEN_FULL_S = 1.0
RETRY_WHEN_DOWN_S = 5.0


class Overloaded(Exception):
    """Too many requests wait; try again after ``retry_after_s`` seconds."""

    def __init__(self, message: str, retry_after_s: float = RETRY_WHEN_FULL_S) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class Unavailable(Exception):
    """The server is starting or draining; ``reason`` says which."""

    def __init__(self, reason: str, retry_after_s: float = RETRY_WHEN_DOWN_S) -> None:
        super().__init__(reason)
        self.reason = reason
        self.retry_after_s = retry_after_s


class Stream:
    """The outputs of one request; ends after the one with a ``finish_reason``.

    What a slow reader has not taken is one output, not a queue of them.
    """

    def __init__(self, request: Request) -> None:
        self.request = request
        self._pending: Output | None = None
        self._ended = False
        self._changed = asyncio.Event()

    def put(self, output: Output) -> None:
        """Add what came, joined to what is still unread. After the end nothing is added."""
        if self._ended:
            return
        self._ended = output.finish_reason is not None
        if self._pending is not None:
            output = replace(
                output,
                first_index=self._pending.first_index,
                token_ids=self._pending.token_ids + output.token_ids,
                text=self._pending.text + output.text,
            )
        self._pending = output
        self._changed.set()

    async def __aiter__(self) -> AsyncIterator[Output]:
        while True:
            await self._changed.wait()
            self._changed.clear()
            output, self._pending = self._pending, None
            if output is not None:
                yield output
                if output.finish_reason is not None:
                    return


class Service:
    """Ties requests to streams. Used on the event loop of rank 0."""

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
    def num_live(self) -> int:
        """Requests that are not answered to their end."""
        return self._dispatcher.num_live

    def set_ready(self, max_model_len: int) -> None:
        """Every replica is ready; contexts hold ``max_model_len`` tokens."""
        self.max_model_len = max_model_len
        self.ready = True

    def start_draining(self) -> None:
        """Refuse new requests from now on."""
        self.draining = True

    async def drained(self) -> None:
        """Wait until no request is live."""
        await self._idle.wait()

    def submit(self, requests: Sequence[Request]) -> list[Stream]:
        """Accept all of ``requests`` or, raising ``Overloaded`` or ``Unavailable``, none.

        Their ids must be unlike those of all live requests.
        """
        self._check_open()
        if any(request.id in self._streams for request in requests):
            raise ValueError("a request with this id is live")
        try:
            outgoing = self._dispatcher.submit(requests)
        except TooManyWaiting as error:
            self._metrics.on_rejected("overloaded", len(requests))
            raise Overloaded(str(error)) from None
        streams = [Stream(request) for request in requests]
        self._streams |= {stream.request.id: stream for stream in streams}
        self._idle.clear()
        for request in requests:
            self._metrics.on_accepted(request, self._clock())
        self._send_all(outgoing)
        return streams

    def abort(self, request_id: str) -> None:
        """Stop a request wherever it is; unknown and ended ones are ignored."""
        outgoing = self._dispatcher.abort(request_id)
        if not outgoing:
            return
        self._send_all(outgoing)
        self._pass_on(
            Output(
                request_id=request_id,
                first_index=0,
                token_ids=(),
                text="",
                finish_reason=FinishReason.ABORT,
            )
        )

    def on_report(self, report: Report, offset_s: float = 0.0) -> None:
        """Pass a replica's report on to the streams."""
        outputs, outgoing = self._dispatcher.on_report(report, offset_s)
        self._metrics.on_report(report)
        for output in outputs:
            self._pass_on(output)
        self._send_all(outgoing)

    def fail_all(self, reason: str) -> None:
        """End every stream with an error, and accept nothing more."""
        self.draining = True
        for output in self._dispatcher.fail_all(reason):
            self._pass_on(output)

    def cluster(self) -> list[dict[str, Any]]:
        """The replicas of ``GET /cluster``."""
        return self._dispatcher.cluster()

    def _check_open(self) -> None:
        if self.draining:
            raise Unavailable("the server is shutting down")
        if not self.ready:
            raise Unavailable("the server is starting")

    def _pass_on(self, output: Output) -> None:
        stream = self._streams[output.request_id]
        self._metrics.on_output(output, self._clock())
        stream.put(output)
        if output.finish_reason is not None:
            del self._streams[output.request_id]
            if not self._streams:
                self._idle.set()

    def _send_all(self, outgoing: Sequence[Outgoing]) -> None:
        for rank, message in outgoing:
            self._send(rank, message)
