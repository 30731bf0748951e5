"""Answers as server-sent events: the choices of one call, interleaved as their tokens come."""

from __future__ import annotations

import asyncio
from typing import Any

import msgspec
from aiohttp import web

from serve.api.answers import Format
from serve.api.call import Call
from serve.api.errors import error_object, from_exception
from serve.api.service import Output, Service, Stream
from serve.request import FinishReason

DONE = b"data: [DONE]\n\n"
MAX_QUEUED = 64  # outputs between the choices and the socket; a slow reader's tokens merge beyond

_HEADERS = {
    "Content-Type": "text/event-stream; charset=utf-8",
    "Cache-Control": "no-cache",
    "X-Accel-Buffering": "no",
}

Item = tuple[int, Output | None]  # choice; None: its stream has ended


class CallFailed(Exception):
    """A choice ended with an error; the reason is the server's own."""


async def stream_answer(
    http: web.Request, call: Call, answer: Format, service: Service, streams: list[Stream]
) -> web.StreamResponse:
    """Write every choice's chunks, then usage if asked for, then ``[DONE]``.

    When the client goes away this is cancelled or the write fails; the caller aborts the requests.
    """
    response = web.StreamResponse(headers={**_HEADERS, "X-Request-Id": http["id"]})
    await response.prepare(http)
    http["streaming"] = True
    queue: asyncio.Queue[Item] = asyncio.Queue(MAX_QUEUED)
    feeders = [asyncio.create_task(_feed(queue, i, stream)) for i, stream in enumerate(streams)]
    try:
        await _write_choices(response, call, answer, queue)
        await response.write(DONE)
    except (asyncio.CancelledError, ConnectionError):
        raise
    except Exception as error:  # the status is sent: the error becomes an event
        told = from_exception(error) if not isinstance(error, CallFailed) else None
        message, status = (str(told), told.status) if told else (str(error), 500)
        await response.write(_event(error_object(message, status)) + DONE)
    finally:
        for feeder in feeders:
            feeder.cancel()
    await response.write_eof()
    return response


async def _feed(queue: asyncio.Queue[Item], index: int, stream: Stream) -> None:
    async for output in stream:
        await queue.put((index, output))
    await queue.put((index, None))


async def _write_choices(
    response: web.StreamResponse, call: Call, answer: Format, queue: asyncio.Queue[Item]
) -> None:
    num_open = len(call.requests)
    num_tokens = [0] * num_open
    opened: set[int] = set()
    while num_open:
        items = [await queue.get()]
        while not queue.empty():  # what came meanwhile goes out in the same write
            items.append(queue.get_nowait())
        events = []
        for index, output in items:
            if output is None:
                num_open -= 1
                continue
            if output.finish_reason is FinishReason.ERROR:
                raise CallFailed(output.error or "the request failed")
            num_tokens[index] += len(output.token_ids)
            chunks = _chunks(call, answer, index, output, opened)
            events += [_event(_with_usage(call, chunk, index, num_tokens)) for chunk in chunks]
        if events:
            await response.write(b"".join(events))
    if call.include_usage:
        await response.write(_event(answer.closing(call, sum(num_tokens))))


def _chunks(
    call: Call, answer: Format, index: int, output: Output, opened: set[int]
) -> list[dict[str, Any]]:
    chunks = []
    if index not in opened:
        opened.add(index)
        opening = answer.opening(call, index)
        if opening is not None:
            chunks.append(opening)
    chunks.append(answer.chunk(call, index, output))
    return chunks


def _with_usage(
    call: Call, chunk: dict[str, Any], index: int, num_tokens: list[int]
) -> dict[str, Any]:
    if call.continuous_usage:
        length, count = len(call.prompt_of(index)), num_tokens[index]
        chunk["usage"] = {
            "prompt_tokens": length,
            "completion_tokens": count,
            "total_tokens": length + count,
        }
    return chunk


def _event(data: dict[str, Any]) -> bytes:
    return b"data: " + msgspec.json.encode(data) + b"\n\n"
