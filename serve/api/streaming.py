"""Answers as server-sent events. The choices of a call are interleaved as their tokens arrive."""

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
_MARK = "\0text\0"  # stands for the text; ids and model names have no such characters


class CallFailed(Exception):
    """A choice ended with an error. The text is the service's reason, for the client to read."""


async def stream_answer(
    http: web.Request, call: Call, form: Format, streams: Sequence[Stream]
) -> web.StreamResponse:
    """Write the chunks of all choices, then the usage if requested, then ``[DONE]``.

    When the client disconnects, this coroutine is cancelled or its write fails. The caller then
    aborts the requests.
    """
    response = web.StreamResponse(headers={**_HEADERS, "X-Request-Id": http[ID]})
    await response.prepare(http)
    http[STREAMING] = True
    try:
        await _write_choices(response, ChunkWriter(call, form), streams)
    except ConnectionError:
        raise
    except CallFailed as error:
        await response.write(_event(error_object(str(error), 500)))
    except Exception as error:  # the status has been sent, so the error becomes an event
        answer_error = from_exception(error)
        await response.write(_event(error_object(str(answer_error), answer_error.status)))
    await response.write_eof(DONE)
    return response


async def _write_choices(
    response: web.StreamResponse, writer: ChunkWriter, streams: Sequence[Stream]
) -> None:
    """Write the outputs that arrived together in one write.

    A slow reader delays only itself: its stream joins the outputs that it has not read.
    """
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
    if writer.call.body.include_usage:
        await response.write(_event(writer.closing()))


class ChunkWriter:
    """Turns outputs into events, and counts their tokens.

    The chunks between a choice's first and last differ only in their text, unless usage or token
    ids are requested. So the bytes before and after the text, the frame, are encoded only once.
    """

    def __init__(self, call: Call, form: Format) -> None:
        self.call, self._form = call, form
        self._num_tokens = [0] * len(call.requests)
        self._opened: set[int] = set()
        self._frames: dict[int, tuple[bytes, bytes]] = {}  # by choice

    def events(self, index: int, output: Output) -> bytes:
        """Return the encoded events for ``output`` of choice ``index``."""
        frame = self._frames.get(index)
        if frame is None or output.finish_reason is not None:
            chunks = list(self.chunks(index, output))
            body = self.call.body
            if not (body.continuous_usage or body.return_token_ids):
                self._frames[index] = self._frame(index, output)
            return b"".join([_event(chunk) for chunk in chunks])
        self._num_tokens[index] += len(output.token_ids)
        return frame[0] + _encode(output.text) + frame[1]

    def _frame(self, index: int, output: Output) -> tuple[bytes, bytes]:
        plain = replace(output, text=_MARK, finish_reason=None)
        before, _, after = _event(self._form.chunk(self.call, index, plain)).partition(
            _encode(_MARK)
        )
        return before, after

    def chunks(self, index: int, output: Output) -> Iterator[dict[str, Any]]:
        """Yield the chunks for ``output`` of choice ``index``, the opening one first."""
        if index not in self._opened:
            self._opened.add(index)
            opening = self._form.opening(self.call, index)
            if opening is not None:
                yield self._count(opening, index)
        self._num_tokens[index] += len(output.token_ids)
        yield self._count(self._form.chunk(self.call, index, output), index)

    def closing(self) -> dict[str, Any]:
        """Return the chunk with the usage of all choices."""
        return self._form.closing(self.call, sum(self._num_tokens))

    def _count(self, chunk: dict[str, Any], index: int) -> dict[str, Any]:
        if self.call.body.continuous_usage:
            length = len(self.call.prompt_of(index))
            chunk["usage"] = usage_object(length, self._num_tokens[index])
        return chunk


def _event(data: dict[str, Any]) -> bytes:
    return b"data: " + _encode(data) + b"\n\n"
