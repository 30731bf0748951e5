"""Read a request's JSON body into the struct of its endpoint, without holding the event loop.

A large body is read only when the byte budget has admitted it. What has no Content-Length, or is
compressed, is then counted as the largest body, because it can become one.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import msgspec
from aiohttp import web
from aiohttp.http import HttpVersion11

from serve.api.byte_budget import ClientLease
from serve.api.client_identity import client_of
from serve.api.errors import LEASE, ApiError, BodyStalled, name_request
from serve.api.json_fields import decode_fields
from serve.api.refusals import ENCODINGS, unreadable_encoding
from serve.api.schemas import GenerationRequest
from serve.api.settings import API, Api
from serve.api.unsupported import refuse_unsupported
from serve.api.validation import to_struct
from serve.api.work_pool import MEDIUM_BYTES

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
    most = api.settings.http.max_field_values
    fields = await api.pool.run(len(data), lambda: decode_fields(data, kind, most))
    if not issubclass(kind, GenerationRequest):
        return await api.pool.run(len(data), lambda: to_struct(fields, kind))
    name_request(http, fields.get("request_id"))  # also an answer that refuses a field
    refuse_unsupported(fields)
    return await api.pool.run(len(data), lambda: to_struct(fields, kind))


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
        http[LEASE] = await api.pool.clients.acquire(length, client_of(http))
    if http.headers.get("Expect", "").lower() == "100-continue" and http.version >= HttpVersion11:
        await http.writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        http.writer.output_size = 0  # the answer has not begun
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
            http[LEASE] = await api.pool.clients.acquire(limit, client_of(http))
    lease: ClientLease | None = http.get(LEASE)
    if lease is not None:
        lease.shrink(num_bytes)
    return b"".join(chunks)


def _too_large(limit: int) -> ApiError:
    reason = f"the body exceeds {limit} bytes (--max-body-bytes)"
    return ApiError(reason, status=413, headers=_CLOSE)
