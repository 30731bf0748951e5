"""Connection: one client's connection, with deadlines and limits around aiohttp's protocol.

    head     from the first byte of a request to the end of its headers: --header-timeout-s
    body     brings 64 KiB, or its end, in --body-timeout-s; the handler gets ``BodyStalled``
    answer   a client that reads nothing of what waits for it in --write-timeout-s is dropped
    closing  what is not read by then in another --write-timeout-s is dropped, too

A client that closes its sending side may still want its answer, or may be gone: until something
is written to it, both look the same. So while the answer is made, the client is probed with bytes
that it must ignore: a comment in a stream of events, else ``100 Continue``, which RFC 9110 allows
before any answer. One that is gone answers the first probe with a reset, and the next one fails.
Its request is then aborted. A client of HTTP/1.0 cannot be probed before its answer begins, so
there the end of its sending counts as its leaving.
"""

from __future__ import annotations

import asyncio
import logging
import uuid
from typing import Any, cast

from aiohttp import web
from aiohttp.http import HttpVersion11
from aiohttp.streams import StreamReader

from serve.api.connection_table import ConnectionTable
from serve.api.countdown import Countdown
from serve.api.errors import STREAMING, BodyStalled, headers_too_large
from serve.api.refusals import MAX_HEADERS, Refusal, explain
from serve.config.http import HttpLimits

log = logging.getLogger(__name__)

_READ_BYTES = 64 << 10  # of a body that no handler reads yet; twice as many may wait in memory
_BODY_BYTES = 64 << 10  # that a body brings within its time-out at least
_LINGER_S = 5.0  # in which the rest of a refused body is read, so that the answer arrives
_FIRST_PROBE_S, _LAST_PROBE_S = 0.005, 15.0

_CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"
_COMMENT = b":\n\n"


class Connection(web.RequestHandler):
    """The protocol of one connection. aiohttp reads requests and writes answers."""

    def __init__(
        self,
        server: web.Server,
        limits: HttpLimits,
        table: ConnectionTable,
        loop: asyncio.AbstractEventLoop,
    ) -> None:
        options: dict[str, Any] = {"access_log": None, "logger": log}
        super().__init__(
            server,
            loop=loop,
            keepalive_timeout=limits.keep_alive_timeout_s,
            max_line_size=limits.max_header_bytes,
            max_field_size=limits.max_header_bytes,
            max_headers=MAX_HEADERS,
            lingering_time=_LINGER_S,
            read_bufsize=_READ_BYTES,
            **options,
        )
        self._limits, self._table = limits, table
        self._wire: asyncio.Transport | None = None  # None before and after it is counted
        self._peer: str | None = None
        self._num_answered = 0
        self._payload: StreamReader | None = None  # of the last request that has been parsed
        self._head_bytes = self._body_bytes = 0
        self._head = Countdown(loop, limits.header_timeout_s, self._on_late_head)
        self._body = Countdown(loop, limits.body_timeout_s, self._on_late_body)
        self._write = Countdown(loop, limits.write_timeout_s, self._on_late_reader)
        self._flushed = 0  # bytes that the client had taken when ``_write`` was started
        self._probe_s = 0.0  # 0: the client has not closed its side
        self._timer: asyncio.TimerHandle | None = None  # of the next probe, or of the close

    # --- the transport's calls ------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Count the connection, or refuse it before a byte is read."""
        wire = cast(asyncio.Transport, transport)
        peer = wire.get_extra_info("peername")
        self._peer = peer[0] if isinstance(peer, tuple) else None
        refusal = self._table.enter(self._peer)
        if refusal is not None:
            wire.write(refusal.to_bytes())
            wire.close()
            self.force_close()  # what arrives now is ignored
            return
        self._wire = wire
        super().connection_made(transport)

    def connection_lost(self, exc: BaseException | None) -> None:
        """Stop every deadline. aiohttp cancels the handler, which aborts its requests."""
        super().connection_lost(exc)
        for countdown in (self._head, self._body, self._write):
            countdown.cancel()
        self._set_timer(None)
        if self._wire is not None:
            self._wire = None
            self._table.leave(self._peer)

    def data_received(self, data: bytes) -> None:
        """Parse ``data``, and note what it is progress of."""
        before, payload = self._request_count, self._payload
        was_in_body = self._in_body
        super().data_received(data)
        if self._request_count != before:
            self._payload = self._messages[-1][1]
            self._head.stop()
            self._head_bytes = 0
            if was_in_body and payload is not None and not payload.is_eof():
                # What follows an incomplete body can only be an error in the body.
                payload.set_exception(web.RequestPayloadError("the body is not valid HTTP"))
        elif data and not was_in_body and not self._force_close:
            self._on_part_of_head(len(data))
        if self._in_body:
            self._on_part_of_body(len(data))
        else:
            self._body.stop()

    def eof_received(self) -> bool:  # type: ignore[override]  # aiohttp always closes
        """Keep the connection while answers are due, and find out whether the client reads."""
        if self._wire is None or self._num_due == 0 or self._in_body:
            return False
        if not self._probe_s:
            self._probe_s = _FIRST_PROBE_S
            self._probe()
        return True

    def pause_writing(self) -> None:
        """Begin to count: the client has as much to read as may wait for it."""
        super().pause_writing()
        self._flushed = self._count_flushed()
        self._write.start()

    def resume_writing(self) -> None:
        """Stop counting: the client has read."""
        self._write.stop()
        super().resume_writing()

    # --- aiohttp's calls ------------------------------------------------------------------------

    async def start(self) -> None:
        """Answer the requests of the connection; afterwards it is closed, read or not."""
        try:
            await super().start()
        finally:
            if self._wire is not None:
                self._set_timer(self._limits.write_timeout_s, self._wire.abort)

    async def finish_response(
        self, request: web.BaseRequest, resp: web.StreamResponse, start_time: float | None
    ) -> tuple[web.StreamResponse, bool]:
        """Write the answer; close after the last one if the client sends nothing more."""
        finished = await super().finish_response(request, resp, start_time)
        self._num_answered += 1
        if self._probe_s and self._num_due == 0:
            self.close()
        return finished

    def handle_error(
        self,
        request: web.BaseRequest,
        status: int = 500,
        exc: BaseException | None = None,
        message: str | None = None,
    ) -> web.StreamResponse:
        """Answer what never was a request, or a failure outside of the application's handlers."""
        if status < 500:
            refusal = explain(exc, self._limits)
            self._log_refusal(refusal)
        else:
            log.error("a request from %s failed", self._peer, exc_info=exc)
            refusal = Refusal(status, "the server failed to answer this request")
        if request.writer.output_size > 0:
            raise ConnectionError("a part of another answer has been sent")
        headers = {"X-Request-Id": uuid.uuid4().hex, **refusal.headers}
        answer = web.Response(
            status=refusal.status,
            body=refusal.body(),
            content_type="application/json",
            headers=headers,
        )
        answer.force_close()
        return answer

    def log_exception(self, *args: Any, **kw: Any) -> None:
        """Log a failure, but not a body that the client has not sent as it should."""
        level = logging.DEBUG if isinstance(kw.get("exc_info"), _CLIENT_FAULTS) else logging.ERROR
        log.log(level, *args, **kw)

    # --- deadlines ------------------------------------------------------------------------------

    @property
    def _num_due(self) -> int:
        return self._request_count - self._num_answered

    @property
    def _in_body(self) -> bool:
        payload = self._payload
        return payload is not None and not payload.is_eof() and payload.exception() is None

    def _on_part_of_head(self, num_bytes: int) -> None:
        if not self._head.running:
            self._head.start()
        self._head_bytes += num_bytes
        if self._head_bytes > self._limits.all_header_bytes:
            self._refuse(Refusal(431, headers_too_large(self._limits)))

    def _on_late_head(self) -> None:
        limit = self._limits.header_timeout_s
        self._refuse(
            Refusal(408, f"the headers were not complete after {limit:g} s (--header-timeout-s)")
        )

    def _on_part_of_body(self, num_bytes: int) -> None:
        self._body_bytes += num_bytes
        if not self._body.running or self._body_bytes >= _BODY_BYTES:
            self._body_bytes = 0
            self._body.start()

    def _on_late_body(self) -> None:
        if self._reading_paused or self._buffer_paused:  # the server is late, not the client
            self._body.start()
        elif self._in_body and self._payload is not None:
            limit = self._limits.body_timeout_s
            self._payload.set_exception(
                BodyStalled(
                    f"the body brought less than {_BODY_BYTES >> 10} KiB in {limit:g} s "
                    "(--body-timeout-s)"
                )
            )

    def _on_late_reader(self) -> None:
        flushed = self._count_flushed()
        if flushed != self._flushed:
            self._flushed = flushed
            self._write.start()
        elif self._wire is not None:
            limit = self._limits.write_timeout_s
            log.info("dropped %s: it read nothing for %g s (--write-timeout-s)", self._peer, limit)
            self._wire.abort()

    def _count_flushed(self) -> int:
        """Return the bytes of the present answer that have left this process."""
        request = self._current_request
        written = request.writer.output_size if request is not None else 0
        return written - (self._wire.get_write_buffer_size() if self._wire is not None else 0)

    def _log_refusal(self, refusal: Refusal) -> None:
        # A flood of refused requests must not become a flood of lines.
        level = logging.INFO if self._table.may_log() else logging.DEBUG
        log.log(level, "refused a request from %s: %s", self._peer, refusal.message)

    def _refuse(self, refusal: Refusal) -> None:
        self._log_refusal(refusal)
        if self._num_due:  # an answer before it is being written
            self.close()
        elif self._wire is not None:
            self._wire.write(refusal.to_bytes())
            self.force_close()

    # --- a client that has closed its side ------------------------------------------------------

    def _probe(self) -> None:
        """Write what the client must ignore, again and again until its answers are complete."""
        if self._wire is None or self._num_due == 0:
            return
        request = self._current_request
        if request is not None and not self._write_probe(request):
            self._wire.abort()
            return
        self._set_timer(self._probe_s, self._probe)
        self._probe_s = min(2 * self._probe_s, _LAST_PROBE_S)

    def _write_probe(self, request: web.BaseRequest) -> bool:
        """Return False if the client cannot be probed at this point of its answer."""
        assert self._wire is not None
        if request.get(STREAMING):
            chunked = getattr(request.writer, "chunked", False)
            self._wire.write(b"%x\r\n%b\r\n" % (len(_COMMENT), _COMMENT) if chunked else _COMMENT)
        elif request.writer.output_size == 0:
            if request.version < HttpVersion11:
                return False
            self._wire.write(_CONTINUE)
        return True  # else the answer is being written, which is a probe by itself

    def _set_timer(self, delay_s: float | None, function: Any = None) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._timer = None if delay_s is None else self._loop.call_later(delay_s, function)


_CLIENT_FAULTS = (web.RequestPayloadError, web.PayloadAccessError)
