"""Endpoints for operators: health, version, metrics and the state of the replicas."""

from __future__ import annotations

import asyncio
from functools import cache
from importlib.metadata import PackageNotFoundError, version

from aiohttp import web

from serve.api.errors import json_response
from serve.api.settings import API


async def health(http: web.Request) -> web.Response:
    """Answer 200 while requests are accepted, 503 while the server starts or drains."""
    service = http.app[API].service
    return web.Response(status=200 if service.ready and not service.draining else 503)


async def ping(http: web.Request) -> web.Response:
    """Answer 200 as long as the front end runs, also while it starts or drains."""
    return web.Response()


async def get_version(http: web.Request) -> web.Response:
    """Answer with the version of this package."""
    return json_response({"version": _version()})


@cache
def _version() -> str:
    try:
        return version("serve")
    except PackageNotFoundError:  # run from a checkout that is not installed
        return "0+checkout"


async def metrics(http: web.Request) -> web.Response:
    """Answer with the metrics in Prometheus' text format."""
    body, content_type = await asyncio.to_thread(http.app[API].metrics.exposition)
    return web.Response(body=body, headers={"Content-Type": content_type})


async def cluster(http: web.Request) -> web.Response:
    """Answer with each replica's last report."""
    return json_response({"replicas": http.app[API].service.cluster()})
