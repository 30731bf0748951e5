"""The HTTP application: its routes, and the socket on which it listens."""

from __future__ import annotations

import socket

from aiohttp import web

from serve.api import generate, models, system, tokens
from serve.api.errors import answer_errors, check_key
from serve.api.settings import API, Api, ApiSettings
from serve.dispatch.metrics import Metrics
from serve.dispatch.service import Service
from serve.tokenizer.tokenizer import Tokenizer

SHUTDOWN_S = 2.0  # how long handlers may still write after the server has stopped


def create_app(
    service: Service, tokenizer: Tokenizer | None, metrics: Metrics, settings: ApiSettings
) -> web.Application:
    """Make an OpenAI-compatible API for ``service``.

    Without a tokenizer it takes prompts as token ids only, and no chats.
    """
    app = web.Application(
        middlewares=[answer_errors, check_key], client_max_size=settings.max_body_bytes
    )
    app[API] = Api(service, tokenizer, metrics, settings)
    app.add_routes(
        [
            web.post("/v1/completions", generate.completions),
            web.post("/v1/chat/completions", generate.chat_completions),
            web.get("/v1/models", models.list_models),
            web.get("/v1/models/{id:.+}", models.get_model),
            web.post("/tokenize", tokens.tokenize),
            web.post("/detokenize", tokens.detokenize),
            web.get("/health", system.health),
            web.get("/ping", system.ping),
            web.post("/ping", system.ping),
            web.get("/version", system.get_version),
            web.get("/metrics", system.metrics),
            web.get("/cluster", system.cluster),
        ]
    )
    return app


async def run_app_on(app: web.Application, listener: socket.socket) -> web.AppRunner:
    """Serve ``app`` on a bound socket. When a client disconnects, its handler is cancelled."""
    runner = web.AppRunner(
        app, handler_cancellation=True, access_log=None, shutdown_timeout=SHUTDOWN_S
    )
    await runner.setup()
    await web.SockSite(runner, listener).start()
    return runner
