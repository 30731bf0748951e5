"""Read a request's JSON body into the struct of its endpoint, without holding the event loop.

Decoding holds the interpreter's lock, in a thread as well: 3 ms for 100,000 token ids. So the
fields of a large body are decoded one by one, and long lists in slices. The event loop runs
between two slices.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any, TypeVar

import msgspec
from aiohttp import web

from serve.api.errors import ApiError
from serve.api.schemas import GenerationRequest
from serve.api.settings import API
from serve.api.unsupported import refuse_unsupported
from serve.api.validation import to_struct

LARGE_BYTES = 4 << 10  # work on a larger body is done in a thread
_SLICE_BYTES = 32 << 10

NUM_BODY_BYTES = web.RequestKey("num_body_bytes", int)

T = TypeVar("T", bound=msgspec.Struct)
Result = TypeVar("Result")


async def read_request(http: web.Request, kind: type[T]) -> T:
    """Read the body as a ``kind``.

    Raises ``ApiError`` or ``InvalidField`` for a wrong body. Raises ``Unavailable`` before it looks
    at the fields, because limits such as the context length are unknown until the server is ready.
    """
    fields = await _read_fields(http)
    http.app[API].service.check_open()
    if issubclass(kind, GenerationRequest):
        refuse_unsupported(fields)
    return to_struct(fields, kind)


async def in_thread_if_large(http: web.Request, function: Callable[[], Result]) -> Result:
    """Call ``function``, in a thread if the body is large, because its work grows with the body."""
    large = http[NUM_BODY_BYTES] > LARGE_BYTES
    return await asyncio.to_thread(function) if large else function()


async def _read_fields(http: web.Request) -> dict[str, Any]:
    """Read the body as a JSON object; 400 for anything else. aiohttp answers 413 by itself."""
    try:
        data = await http.read()
    except web.RequestPayloadError as error:  # for instance, not compressed as its header says
        reason = f"the body cannot be read: {error}"
        raise ApiError(reason, headers={"Connection": "close"}) from None
    http[NUM_BODY_BYTES] = len(data)
    large = len(data) > LARGE_BYTES
    try:
        fields = await asyncio.to_thread(_decode, data) if large else msgspec.json.decode(data)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError, ValueError) as error:
        raise ApiError(f"the body is not valid JSON: {error}") from None
    if not isinstance(fields, dict):
        raise ApiError("the body must be a JSON object")
    return fields


# --- large bodies -------------------------------------------------------------------------------


def _decode(data: bytes) -> Any:
    if not data.lstrip().startswith(b"{"):
        return msgspec.json.decode(data)
    fields = msgspec.json.decode(data, type=dict[str, msgspec.Raw])
    return {name: _decode_value(bytes(raw)) for name, raw in fields.items()}


def _decode_value(raw: bytes) -> Any:
    if len(raw) <= _SLICE_BYTES:
        return msgspec.json.decode(raw)
    match raw[:1], raw[1:].lstrip()[:1]:
        case b"[", b"[":
            parts = msgspec.json.decode(raw, type=list[msgspec.Raw])
            return [_decode_value(bytes(part)) for part in parts]
        case b"[", first if first.isdigit():
            return _decode_numbers(raw)
    return msgspec.json.decode(raw)


def _decode_numbers(raw: bytes) -> list[Any]:
    """Decode a valid JSON array that begins with a number."""
    items: list[Any] = []
    start, end = 1, len(raw) - 1
    try:
        while start <= end:
            comma = raw.find(b",", min(end, start + _SLICE_BYTES), end)
            stop = comma if comma >= 0 else end
            items += msgspec.json.decode(b"[" + raw[start:stop] + b"]")
            start = stop + 1
    except msgspec.DecodeError:  # a slice ended within a string or a list: not only numbers
        return list(msgspec.json.decode(raw))
    return items
