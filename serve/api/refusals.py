"""Answers to what is refused before it is a request: bad HTTP, late headers, too many clients."""

from __future__ import annotations

import uuid
from dataclasses import dataclass, field
from http import HTTPStatus

import msgspec
from aiohttp import compression_utils, http_exceptions

from serve.api.errors import error_object
from serve.api.validation import shorten
from serve.config.http import HttpLimits

MAX_HEADERS = 128

# What a body may be encoded with here. The last two need a library that may not be installed.
ENCODINGS = (
    "gzip",
    "deflate",
    *(("br",) if compression_utils.HAS_BROTLI else ()),
    *(("zstd",) if compression_utils.HAS_ZSTD else ()),
)


@dataclass(frozen=True, slots=True)
class Refusal:
    """An error answer after which the connection is closed."""

    status: int
    message: str
    headers: dict[str, str] = field(default_factory=dict)

    def body(self) -> bytes:
        """Return the JSON of the answer."""
        return msgspec.json.encode(error_object(self.message, self.status))

    def to_bytes(self) -> bytes:
        """Return the whole answer, for a connection on which no request has been read."""
        body = self.body()
        headers = {
            "Content-Type": "application/json",
            "Content-Length": str(len(body)),
            "Connection": "close",
            "X-Request-Id": uuid.uuid4().hex,
            **self.headers,
        }
        lines = [f"HTTP/1.1 {self.status} {HTTPStatus(self.status).phrase}"]
        lines += [f"{name}: {value}" for name, value in headers.items()]
        return "\r\n".join([*lines, "", ""]).encode() + body


def unreadable_encoding(encoding: str) -> Refusal:
    """Return the refusal of a body whose ``Content-Encoding`` cannot be read here."""
    known = ", ".join(ENCODINGS)
    message = (
        f"Content-Encoding {shorten(encoding)} cannot be read by this server; it reads {known}"
    )
    return Refusal(415, message, {"Accept-Encoding": known})


def explain(error: BaseException | None, limits: HttpLimits) -> Refusal:
    """Return the refusal of what aiohttp's parser could not read."""
    message = getattr(error, "message", "") or str(error)
    match error:
        case http_exceptions.LineTooLong():
            size = limits.max_header_bytes
            return Refusal(
                431, f"the request line or a header exceeds {size} bytes (--max-header-bytes)"
            )
        case http_exceptions.ContentEncodingError():
            return unreadable_encoding("zstd" if "zstd" in message else "br")
        case http_exceptions.BadHttpMessage() if message.startswith("Too many headers"):
            return Refusal(431, f"the request has more than {MAX_HEADERS} headers")
        case http_exceptions.BadHttpMessage() if "PRI/Upgrade" in message:
            return Refusal(505, "HTTP/2 is not supported by this server; send HTTP/1.1")
        case http_exceptions.BadStatusLine() if "Invalid HTTP version" in message:
            return Refusal(505, "this version of HTTP is not supported by this server")
    lines = [line.strip().rstrip(":") for line in message.splitlines() if line.strip()]
    reason = lines[1] if len(lines) > 1 and lines[0] == "Bad status line" else "".join(lines[:1])
    return Refusal(400, f"the request is not valid HTTP: {reason[:200] or 'unreadable'}")
