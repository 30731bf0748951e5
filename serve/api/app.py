"""The HTTP application: its routes, and the socket on which it listens."""

from __future__ import annotations

import asyncio
import socket
from typing import Any

from aiohttp import web
from aiohttp.http import HttpVersion11
from multidict import CIMultiDict, CIMultiDictProxy

from serve.api import generate, models, system, tokens
from serve.api.connection import Connection
from serve.api.connection_table import ConnectionTable
from serve.api.cors import allow_origin, answer_options
from serve.api.errors import Handler, answer_errors, check_expectation, check_key
from serve.api.settings import API, Api, ApiSettings
from serve.dispatch.metrics import Metrics
from serve.dispatch.service import Service
from serve.tokenizer.tokenizer import Tokenizer

BACKLOG = 1024  # connections that the kernel keeps until they are accepted
SHUTDOWN_S = 2.0  # how long handlers may still write after the server has stopped


def create_app(
    service: Service, tokenizer: Tokenizer | None, metrics: Metrics, settings: ApiSettings
) -> web.Application:
    """Make an OpenAI-compatible API for ``service``.

    Without a tokenizer it takes prompts as token ids only, and no chats.
    """
    app = web.Application(middlewares=[answer_errors, answer_options, check_key])
    app[API] = Api(service, tokenizer, metrics, settings)
    app.on_response_prepare.append(allow_origin)
    app.on_cleanup.append(_end_threads)
    app.add_routes(
        [
            _post("/v1/completions", generate.completions),
            _post("/v1/chat/completions", generate.chat_completions),
            web.get("/v1/models", models.list_models),
            web.get("/v1/models/{id:.+}", models.get_model),
            _post("/tokenize", tokens.tokenize),
            _post("/detokenize", tokens.detokenize),
            web.get("/health", system.health),
            web.get("/ping", system.ping),
            web.post("/ping", system.ping),
            web.get("/version", system.get_version),
            web.get("/metrics", system.metrics),
            web.get("/cluster", system.cluster),
        ]
    )
    return app


def _post(path: str, handler: Handler) -> web.RouteDef:
    return web.post(path, handler, expect_handler=check_expectation)


async def run_app_on(app: web.Application, listener: socket.socket) -> web.AppRunner:
    """Serve ``app`` on a bound socket. When a client disconnects, its handler is cancelled."""
    runner = web.AppRunner(app, handler_cancellation=True, shutdown_timeout=SHUTDOWN_S)
    await runner.setup()
    await _Site(runner, listener, backlog=BACKLOG).start()
    return runner


async def _end_threads(app: web.Application) -> None:
    app[API].pool.close()


class _Site(web.SockSite):
    """A socket whose connections are ``Connection`` instead of aiohttp's own protocol."""

    async def start(self) -> None:
        """Listen."""
        await web.BaseSite.start(self)  # counts this site as the runner's
        runner = self._runner
        assert isinstance(runner, web.AppRunner)
        assert runner.server is not None
        server, loop = runner.server, asyncio.get_running_loop()
        make_request = server.request_factory

        def request_of(message: Any, *args: Any) -> web.BaseRequest:
            if message.method == "UNKNOWN":  # what aiohttp's parser has refused
                headers = CIMultiDictProxy(CIMultiDict[str]())
                message = message._replace(version=HttpVersion11, headers=headers)
            return make_request(message, *args)

        server.request_factory = request_of
        limits = runner.app[API].settings.http
        table = ConnectionTable(limits)
        self._server = await loop.create_server(
            lambda: Connection(server, limits, table, loop),
            sock=self._sock,
            backlog=self._backlog,
        )
