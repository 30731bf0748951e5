"""Errors in the OpenAI API's shape, for every answer that is not a success."""

from __future__ import annotations

import hmac
import logging
import math
import uuid
from collections.abc import Awaitable, Callable
from typing import Any

import msgspec
from aiohttp import web

from serve.api.settings import API
from serve.dispatch.service import Overloaded, Unavailable

log = logging.getLogger(__name__)

_OPEN_PATHS = frozenset(("/health", "/ping", "/version", "/metrics", "/cluster"))  # need no key

ID = web.RequestKey("id", str)  # of the request, the client's or ours
NAMED = web.RequestKey("named", bool)  # whether it is the client's
STREAMING = web.RequestKey("streaming", bool)  # whether the status is sent already

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]

_TYPES = {
    400: "BadRequestError",
    401: "AuthenticationError",
    404: "NotFoundError",
    405: "MethodNotAllowedError",
    413: "RequestTooLargeError",
    429: "RateLimitError",
    500: "InternalServerError",
    503: "ServiceUnavailableError",
}


CLIENT_GONE = 499  # as nginx has it; only ever seen in a log


class ApiError(Exception):
    """An answer other than success; ``param`` names the field of the body that is at fault."""

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


def error_object(message: str, status: int, param: str | None = None) -> dict[str, Any]:
    """The body of an error answer, and of an error event in a stream."""
    kind = _TYPES.get(status, "BadRequestError" if status < 500 else "InternalServerError")
    return {"error": {"message": message, "type": kind, "param": param, "code": status}}


def sane_id(text: str) -> bool:
    """Whether a client's name for its request can be ours, and go into a header."""
    return 0 < len(text) <= 128 and text.isascii() and text.isprintable()


def json_response(data: Any, status: int = 200, headers: Any = None) -> web.Response:
    """``data`` as JSON."""
    return web.Response(
        body=msgspec.json.encode(data),
        status=status,
        content_type="application/json",
        headers=headers,
    )


def from_exception(error: Exception) -> ApiError:
    """What a client is told about ``error``; a 500 for what should not have happened."""
    match error:
        case ApiError():
            return error
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


def _retry(seconds: float) -> dict[str, str]:
    return {"Retry-After": str(max(1, math.ceil(seconds)))}


@web.middleware
async def answer_errors(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Turn exceptions into error answers, and name the request in every answer."""
    given = request.headers.get("X-Request-Id", "")
    request[NAMED] = sane_id(given)
    request[ID] = given if request[NAMED] else uuid.uuid4().hex
    try:
        response = await handler(request)
    except ConnectionError:  # the client has gone: nobody reads this, and it is no error
        return web.Response(status=CLIENT_GONE)
    except Exception as raised:
        if request.get(STREAMING):  # the status is sent; the connection is all that is left
            raise
        error = from_exception(raised)
        body = error_object(str(error), error.status, error.param)
        response = json_response(body, error.status, error.headers)
    if not response.prepared:
        response.headers["X-Request-Id"] = request[ID]
    return response


@web.middleware
async def check_key(request: web.Request, handler: Handler) -> web.StreamResponse:
    """401 without the key, on everything but what tells only how the server is."""
    key = request.app[API].settings.api_key
    if key is not None and request.path not in _OPEN_PATHS:
        scheme, _, given = request.headers.get("Authorization", "").partition(" ")
        same = hmac.compare_digest(given.encode("utf-8", "surrogateescape"), key.encode())
        if not same or scheme.lower() != "bearer":
            raise ApiError("the API key is missing or wrong", status=401)
    return await handler(request)
