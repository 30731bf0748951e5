"""Answers as server-sent events: the choices of one call, interleaved as their tokens come."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import msgspec
from aiohttp import web
from msgspec.structs import replace

from serve.api.answers import Format
from serve.api.call import Call, usage_object
from serve.api.errors import ID, STREAMING, error_object, from_exception
from serve.dispatch.service import Output, Stream, read_all
from serve.request import FinishReason

DONE = b"data: [DONE]\n\n"

_HEADERS = {
    "Content-Type": "text/event-stream; charset=utf-8",
    "Cache-Control": "no-cache",
    "X-Accel-Buffering": "no",
}


_encode = msgspec.json.Encoder().encode
_MARK = "\0text\0"  # ids and names have no such characters


class CallFailed(Exception):
    """A choice ended with an error; the reason is the server's own."""


async def stream_answer(
    http: web.Request, call: Call, answer: Format, streams: Sequence[Stream]
) -> web.StreamResponse:
    """Write every choice's chunks, then usage if asked for, then ``[DONE]``.

    When the client goes away this is cancelled or the write fails; the caller aborts the requests.
    """
    response = web.StreamResponse(headers={**_HEADERS, "X-Request-Id": http[ID]})
    await response.prepare(http)
    http[STREAMING] = True
    try:
        await _write_choices(response, ChunkWriter(call, answer), streams)
    except ConnectionError:
        raise
    except CallFailed as error:
        await response.write(_event(error_object(str(error), 500)))
    except Exception as error:  # the status is sent: the error becomes an event
        told = from_exception(error)
        await response.write(_event(error_object(str(told), told.status)))
    await response.write_eof(DONE)
    return response


async def _write_choices(
    response: web.StreamResponse, writer: ChunkWriter, streams: Sequence[Stream]
) -> None:
    """One write for what came together. A slow reader holds up nobody: its tokens merge."""
    async for batch in read_all(streams):
        error = None
        events = []
        for index, output in batch:
            if output.finish_reason is FinishReason.ERROR:
                error = CallFailed(output.error or "the request failed")
                if not output.token_ids:
                    continue
                output = replace(output, finish_reason=None)
            events.append(writer.events(index, output))
        if events:
            await response.write(b"".join(events))
        if error is not None:
            raise error
    if writer.call.options.include_usage:
        await response.write(_event(writer.closing()))


class ChunkWriter:
    """Makes chunks of outputs, and counts their tokens.

    Between its first and its last chunk a choice's chunks differ in nothing but their text, if no
    more is asked for: what stands around it is encoded once.
    """

    def __init__(self, call: Call, answer: Format) -> None:
        self.call, self._answer = call, answer
        self._num_tokens = [0] * len(call.requests)
        self._opened: set[int] = set()
        self._frames: dict[int, tuple[bytes, bytes]] = {}  # by choice: before and after the text

    def events(self, index: int, output: Output) -> bytes:
        """The events that tell of ``output`` of choice ``index``."""
        frame = self._frames.get(index)
        if frame is None or output.finish_reason is not None:
            chunks = list(self.chunks(index, output))
            options = self.call.options
            if not (options.continuous_usage or options.return_token_ids):
                self._frames[index] = self._frame(index, output)
            return b"".join([_event(chunk) for chunk in chunks])
        self._num_tokens[index] += len(output.token_ids)
        return frame[0] + _encode(output.text) + frame[1]

    def _frame(self, index: int, output: Output) -> tuple[bytes, bytes]:
        plain = replace(output, text=_MARK, finish_reason=None)
        before, _, after = _event(self._answer.chunk(self.call, index, plain)).partition(
            _encode(_MARK)
        )
        return before, after

    def chunks(self, index: int, output: Output) -> Iterator[dict[str, Any]]:
        """The chunks of choice ``index`` that tell of ``output``."""
        if index not in self._opened:
            self._opened.add(index)
            opening = self._answer.opening(self.call, index)
            if opening is not None:
                yield self._count(opening, index)
        self._num_tokens[index] += len(output.token_ids)
        yield self._count(self._answer.chunk(self.call, index, output), index)

    def closing(self) -> dict[str, Any]:
        """The chunk with the usage of all choices."""
        return self._answer.closing(self.call, sum(self._num_tokens))

    def _count(self, chunk: dict[str, Any], index: int) -> dict[str, Any]:
        if self.call.options.continuous_usage:
            length = len(self.call.prompt_of(index))
            chunk["usage"] = usage_object(length, self._num_tokens[index])
        return chunk


def _event(data: dict[str, Any]) -> bytes:
    return b"data: " + _encode(data) + b"\n\n"
