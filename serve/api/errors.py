"""Error answers in the shape of OpenAI's API, and the middlewares that make them."""

from __future__ import annotations

import logging
import math
import uuid
from collections.abc import Awaitable, Callable
from typing import Any

import msgspec
from aiohttp import web

from serve.api.byte_budget import ClientLease
from serve.api.client_identity import valid_key
from serve.api.settings import API
from serve.api.validation import InvalidField, shorten
from serve.config.http import HttpLimits
from serve.dispatch.service import Overloaded, Unavailable

log = logging.getLogger(__name__)

# They need no key, because probes and metrics collectors have none.
_OPEN_PATHS = frozenset(("/health", "/ping", "/version", "/metrics", "/cluster"))

ID = web.RequestKey("id", str)  # of the request: the client's, or a random one
NAMED = web.RequestKey("named", bool)  # whether the client chose it in a header
STREAMING = web.RequestKey("streaming", bool)  # whether the status has been sent
LEASE = web.RequestKey("lease", ClientLease)  # what the body occupies of the byte budget

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]

_TYPES = {
    400: "BadRequestError",
    401: "AuthenticationError",
    404: "NotFoundError",
    405: "MethodNotAllowedError",
    408: "RequestTimeoutError",
    413: "RequestTooLargeError",
    415: "UnsupportedMediaTypeError",
    417: "ExpectationFailedError",
    429: "RateLimitError",
    431: "RequestTooLargeError",
    500: "InternalServerError",
    503: "ServiceUnavailableError",
    505: "UnsupportedVersionError",
}

CLIENT_GONE = 499  # nginx's status for it; it appears in logs only


class ApiError(Exception):
    """An answer other than success. ``param`` names the field of the body that is wrong."""

    def __init__(
        self,
        message: str,
        *,
        status: int = 400,
        param: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.param, self.headers = status, param, headers


class BodyStalled(web.RequestPayloadError):
    """A client has stopped sending its body; the text names the limit."""


def error_object(message: str, status: int, param: str | None = None) -> dict[str, Any]:
    """Return the body of an error answer, which is also that of an error event in a stream."""
    kind = _TYPES.get(status, "BadRequestError" if status < 500 else "InternalServerError")
    return {"error": {"message": message, "type": kind, "param": param, "code": status}}


def sane_id(text: str) -> bool:
    """Return whether a client's id for its request may be used, also in a header."""
    return 0 < len(text) <= 128 and text.isascii() and text.isprintable()


def name_request(http: web.Request, request_id: Any) -> str:
    """Return the request's id. A body's ``request_id`` counts if no header has one."""
    if not http[NAMED] and isinstance(request_id, str) and sane_id(request_id):
        http[ID] = request_id
    return http[ID]


def json_response(data: Any, status: int = 200, headers: Any = None) -> web.Response:
    return web.Response(
        body=msgspec.json.encode(data),
        status=status,
        content_type="application/json",
        headers=headers,
    )


def from_exception(error: Exception) -> ApiError:
    """Return the answer to ``error``. An unexpected one is logged and hidden behind a 500."""
    match error:
        case ApiError():
            return error
        case InvalidField():
            return ApiError(str(error), param=error.param)
        case Overloaded():
            return ApiError(str(error), status=429, headers=_retry(error.retry_after_s))
        case Unavailable():
            return ApiError(str(error), status=503, headers=_retry(error.retry_after_s))
        case web.HTTPException():
            allow = error.headers.get("Allow")
            headers = {"Allow": allow} if allow else None
            return ApiError(error.text or error.reason, status=error.status, headers=headers)
        case _:
            log.error("a request failed", exc_info=error)
            return ApiError("the server failed to answer this request", status=500)


def headers_too_large(limits: HttpLimits) -> str:
    """Return the reason to refuse a request by the size of its headers."""
    return f"the headers exceed {limits.all_header_bytes} bytes (8 times --max-header-bytes)"


def _check_headers(request: web.Request) -> None:
    """Answer 431 to too large headers. Those that came in one piece are complete here only."""
    limits = request.app[API].settings.http
    size = sum(len(name) + len(value) + 4 for name, value in request.raw_headers)
    if size > limits.all_header_bytes:
        reason = headers_too_large(limits)
        raise ApiError(reason, status=431, headers={"Connection": "close"})


def _retry(seconds: float) -> dict[str, str]:
    return {"Retry-After": str(max(1, math.ceil(seconds)))}


@web.middleware
async def answer_errors(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Turn exceptions into error answers, and put the request's id into every answer."""
    header = request.headers.get("X-Request-Id", "")
    request[NAMED] = sane_id(header)
    request[ID] = header if request[NAMED] else uuid.uuid4().hex
    try:
        _check_headers(request)
        response = await handler(request)
    except ConnectionError:  # the client has disconnected, which is not an error
        return web.Response(status=CLIENT_GONE)
    except Exception as raised:
        if request.get(STREAMING):  # too late for another status: aiohttp closes the connection
            raise
        error = from_exception(raised)
        body = error_object(str(error), error.status, error.param)
        response = json_response(body, error.status, error.headers)
        if error.headers is not None and "Connection" in error.headers:
            response.force_close()
    finally:
        if (lease := request.get(LEASE)) is not None:
            lease.release()
    if not response.prepared:
        response.headers["X-Request-Id"] = request[ID]
    return response


async def check_expectation(request: web.Request) -> web.StreamResponse | None:
    """Answer 417 to an unknown ``Expect``. 100 Continue is sent when the body is to be read.

    So a client that waits for it sends no body to a request that is refused by its headers.
    """
    expected = request.headers["Expect"]
    if expected.lower() == "100-continue":
        return None
    reason = f"Expect {shorten(expected)} is not supported by this server"
    headers = {"X-Request-Id": uuid.uuid4().hex}
    return json_response(error_object(reason, 417), 417, headers)


@web.middleware
async def check_key(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Answer 401 without a valid API key, except on the paths that report the server's state."""
    keys = request.app[API].settings.api_keys
    if keys and request.path not in _OPEN_PATHS and valid_key(request.headers, keys) is None:
        challenge = 'Bearer realm="serve"'
        if "Authorization" in request.headers:
            challenge += ', error="invalid_token"'
        raise ApiError(
            "the API key is missing or wrong",
            status=401,
            headers={"WWW-Authenticate": challenge},
        )
    return await handler(request)
