"""What operators and clients ask about the server itself: models, health, metrics, cluster."""

from __future__ import annotations

import asyncio
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from aiohttp import web

from serve.api.call import check_model
from serve.api.errors import json_response
from serve.api.settings import API, Api


async def list_models(http: web.Request) -> web.Response:
    """Every name under which the model is served."""
    api = http.app[API]
    cards = [_model_card(api, name) for name in api.settings.served_model_names]
    return json_response({"object": "list", "data": cards})


async def get_model(http: web.Request) -> web.Response:
    """One of them; ids may have slashes."""
    api = http.app[API]
    return json_response(_model_card(api, check_model(http.match_info["id"], api)))


def _model_card(api: Api, name: str) -> dict[str, Any]:
    return {
        "id": name,
        "object": "model",
        "created": api.settings.created,
        "owned_by": "serve",
        "root": api.settings.model_path,
        "parent": None,
        "max_model_len": api.service.max_model_len or None,
        "permission": [],
    }


async def health(http: web.Request) -> web.Response:
    """200 while requests are taken, 503 before and after."""
    service = http.app[API].service
    return web.Response(status=200 if service.ready and not service.draining else 503)


async def ping(http: web.Request) -> web.Response:
    """200 as long as the front end lives."""
    return web.Response()


async def get_version(http: web.Request) -> web.Response:
    """The server's version."""
    return json_response({"version": _version()})


@cache
def _version() -> str:
    try:
        return version("serve")
    except PackageNotFoundError:  # run from a checkout that is not installed
        return "0+checkout"


async def metrics(http: web.Request) -> web.Response:
    """Prometheus' text format."""
    body, content_type = await asyncio.to_thread(http.app[API].metrics.exposition)
    return web.Response(body=body, headers={"Content-Type": content_type})


async def cluster(http: web.Request) -> web.Response:
    """The replicas, as they last reported."""
    return json_response({"replicas": http.app[API].service.cluster()})
