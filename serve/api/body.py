"""Read a request's JSON body into the struct of its endpoint, without holding the event loop.

A large body is read only when the byte budget has admitted it. What has no Content-Length, or is
compressed, is then counted as the largest body, because it can become one. Decoding holds the
interpreter's lock, in a thread as well: 3 ms for 100,000 token ids. So of a large body only the
fields that mean something are decoded, one by one, and long lists in slices.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any, TypeVar

import msgspec
from aiohttp import web

from serve.api.byte_budget import Lease
from serve.api.errors import LEASE, ApiError, BodyStalled
from serve.api.refusals import ENCODINGS, unreadable_encoding
from serve.api.schemas import GenerationRequest
from serve.api.settings import API, Api
from serve.api.unsupported import UNSUPPORTED, refuse_unsupported
from serve.api.validation import to_struct
from serve.api.work_pool import MEDIUM_BYTES, SMALL_BYTES

_SLICE_BYTES = 32 << 10
_CLOSE = {"Connection": "close"}  # what is left of the body is not read

NUM_BODY_BYTES = web.RequestKey("num_body_bytes", int)

T = TypeVar("T", bound=msgspec.Struct)
Result = TypeVar("Result")


async def read_request(http: web.Request, kind: type[T]) -> T:
    """Read the body as a ``kind``.

    Raises ``ApiError`` or ``InvalidField`` for a wrong body. Raises ``Unavailable`` before it reads
    anything, because limits such as the context length are unknown until the server is ready.
    """
    api = http.app[API]
    api.service.check_open()
    data = await _read_body(http, api)
    http[NUM_BODY_BYTES] = len(data)
    fields = await api.pool.run(len(data), lambda: _decode_fields(data, kind))
    if issubclass(kind, GenerationRequest):
        refuse_unsupported(fields)
    return to_struct(fields, kind)


async def work_on_body(http: web.Request, function: Callable[[], Result]) -> Result:
    """Call ``function``, whose work grows with the body. The body's part of the budget ends then.

    It is the last thing done with the body.
    """
    lease = http.pop(LEASE, None)
    return await http.app[API].pool.run(http[NUM_BODY_BYTES], function, lease)


# --- bytes --------------------------------------------------------------------------------------


async def _read_body(http: web.Request, api: Api) -> bytes:
    """Return the body, decompressed. Waits until the budget admits it if it is large."""
    encoding = http.headers.get("Content-Encoding", "identity").strip().lower() or "identity"
    if encoding not in ("identity", *ENCODINGS):
        refusal = unreadable_encoding(encoding)
        raise ApiError(refusal.message, status=refusal.status, headers=refusal.headers | _CLOSE)
    limit = api.max_body_bytes
    length = http.content_length if encoding == "identity" else None
    if (http.content_length or 0) > limit:
        raise _too_large(limit)
    if length is not None and length > MEDIUM_BYTES:
        http[LEASE] = await api.pool.budget.acquire(length)
    try:
        return await _read_chunks(http, api, limit)
    except BodyStalled as error:
        raise ApiError(str(error), status=408, headers=_CLOSE) from None
    except web.RequestPayloadError as error:  # for instance, not compressed as its header says
        raise ApiError(f"the body cannot be read: {error}", headers=_CLOSE) from None


async def _read_chunks(http: web.Request, api: Api, limit: int) -> bytes:
    chunks: list[bytes] = []
    num_bytes = 0
    while chunk := await http.content.readany():
        chunks.append(chunk)
        num_bytes += len(chunk)
        if num_bytes > limit:
            raise _too_large(limit)
        if num_bytes > MEDIUM_BYTES and LEASE not in http:
            http[LEASE] = await api.pool.budget.acquire(limit)
    lease: Lease | None = http.get(LEASE)
    if lease is not None:
        lease.shrink(num_bytes)
    return b"".join(chunks)


def _too_large(limit: int) -> ApiError:
    reason = f"the body exceeds {limit} bytes (--max-body-bytes)"
    return ApiError(reason, status=413, headers=_CLOSE)


# --- JSON ---------------------------------------------------------------------------------------


def _decode_fields(data: bytes, kind: type[msgspec.Struct]) -> dict[str, Any]:
    """Return the fields of a JSON object; 400 for anything else."""
    try:
        fields = msgspec.json.decode(data) if len(data) <= SMALL_BYTES else _decode(data, kind)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError, ValueError) as error:
        raise ApiError(f"the body is not valid JSON: {error}") from None
    if not isinstance(fields, dict):
        raise ApiError("the body must be a JSON object")
    return fields


def _decode(data: bytes, kind: type[msgspec.Struct]) -> Any:
    """Decode the fields that ``kind`` has or that must be refused; skip others without a copy."""
    if not data.lstrip().startswith(b"{"):
        return msgspec.json.decode(data)
    raw = msgspec.json.decode(data, type=_raw_fields(kind))
    return {
        name: _decode_value(bytes(value))
        for name in raw.__struct_fields__
        if isinstance(value := getattr(raw, name), msgspec.Raw)
    }


@cache
def _raw_fields(kind: type[msgspec.Struct]) -> type[msgspec.Struct]:
    names = {*kind.__struct_fields__, *UNSUPPORTED}
    return msgspec.defstruct(
        "RawFields",
        [(name, msgspec.Raw | msgspec.UnsetType, msgspec.UNSET) for name in sorted(names)],
    )


def _decode_value(raw: bytes) -> Any:
    if len(raw) <= _SLICE_BYTES:
        return msgspec.json.decode(raw)
    match raw[:1], raw[1:].lstrip()[:1]:
        case b"[", b"[" | b"{" | b'"':
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
