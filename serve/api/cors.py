"""Cross-origin requests: preflights of browsers, and which pages may read answers."""

from __future__ import annotations

from aiohttp import hdrs, web

from serve.api.errors import ApiError, Handler
from serve.api.settings import API

_MAX_AGE_S = "600"
_EXPOSED = "X-Request-Id, Retry-After, WWW-Authenticate"


@web.middleware
async def answer_options(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Answer OPTIONS of any path, without a key: browsers send none with a preflight."""
    if request.method != hdrs.METH_OPTIONS:
        return await handler(request)
    problem = request.match_info.http_exception
    if not isinstance(problem, web.HTTPMethodNotAllowed):
        raise problem or ApiError("there is nothing to be done with OPTIONS", status=405)
    methods = ", ".join(sorted({*problem.allowed_methods, hdrs.METH_OPTIONS}))
    response = web.Response(status=204, headers={"Allow": methods})
    if _allowed_origin(request) is not None:
        response.headers["Access-Control-Allow-Methods"] = methods
        response.headers["Access-Control-Max-Age"] = _MAX_AGE_S
        wanted = request.headers.get("Access-Control-Request-Headers")
        if wanted is not None:
            response.headers["Access-Control-Allow-Headers"] = wanted
    return response


async def allow_origin(request: web.Request, response: web.StreamResponse) -> None:
    """Let the page that asks read the answer, if its origin is allowed. Answers do not vary else.

    Called for every answer of the application, also for errors and streams.
    """
    if not request.app[API].settings.http.allowed_origins:
        return
    response.headers.add("Vary", "Origin")
    origin = _allowed_origin(request)
    if origin is not None:
        response.headers["Access-Control-Allow-Origin"] = origin
        response.headers["Access-Control-Expose-Headers"] = _EXPOSED


def _allowed_origin(request: web.Request) -> str | None:
    """Return the value of ``Access-Control-Allow-Origin``, or None."""
    allowed = request.app[API].settings.http.allowed_origins
    origin = request.headers.get("Origin")
    if origin is None:
        return None
    if "*" in allowed:
        return "*"
    return origin if origin.lower() in allowed else None
