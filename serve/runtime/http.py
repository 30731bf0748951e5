"""Rank 0 with HTTP: listening while the job starts, and draining when it is told to stop."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
import sys
import time

from tqdm import tqdm

from serve.api.app import create_app, run_app_on
from serve.api.settings import ApiSettings
from serve.config.server import ServerConfig
from serve.dispatch.service import Service
from serve.protocol.messages import AnyMessage, StopRequest
from serve.runtime.open_files import fit_connections, raise_open_files_limit
from serve.runtime.rank import RankProcess
from serve.runtime.shutdown import StopSignals, wait_for_either
from serve.runtime.startup import FrontEnd, serving_front_end

log = logging.getLogger("serve")

HTTP_CLOSE_S = 2.0  # how long clients may take to read their last answer or error


async def serve_http(process: RankProcess, listener: socket.socket, signals: StopSignals) -> None:
    """Listen at once, accept requests when every replica is ready, drain on a signal."""

    def on_message(message: AnyMessage) -> None:
        if isinstance(message, StopRequest):
            signals.request(message.at_once)

    async with serving_front_end(process, observe=on_message) as front_end:
        settings = _api_settings(process.config)
        app = create_app(front_end.service, front_end.tokenizer, front_end.metrics, settings)
        runner = await run_app_on(app, listener)
        log.info("listening on %s", _url(listener))
        try:
            start = asyncio.create_task(_get_ready(front_end))
            await wait_for_either(start, signals.first.wait())
            if start.done():
                await start
                await signals.first.wait()
            start.cancel()
            await _drain(front_end.service, signals, process.config.drain_timeout_s)
        except asyncio.CancelledError:  # the job has failed
            _fail_open_requests(front_end.service, process.failure.reason)
            raise
        finally:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(runner.cleanup(), HTTP_CLOSE_S)


async def _get_ready(front_end: FrontEnd) -> None:
    with tqdm(desc="loading weights", unit="tensor", disable=None, file=sys.stderr) as bar:

        def progress(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)
            if done == total:
                bar.close()  # the wait for the other ranks is not progress

        await front_end.get_ready(progress)
    log.info("replicas: %s", front_end.describe_replicas())
    log.info("ready: contexts of up to %d tokens", front_end.service.max_model_len)


async def _drain(service: Service, signals: StopSignals, timeout_s: float) -> None:
    """Refuse new requests and let the open ones finish, until the time-out or a second signal."""
    log.info("stopping; %d requests are still open", service.num_active)
    service.start_draining()
    drained = asyncio.create_task(service.drained())
    with contextlib.suppress(TimeoutError):
        await asyncio.wait_for(wait_for_either(drained, signals.second.wait()), timeout_s)
    drained.cancel()
    service.fail_all("the server is shutting down")


def _fail_open_requests(service: Service, reason: str) -> None:
    """End every open stream with an error."""
    if service.ready:
        log.error("%d requests are open; replicas: %s", service.num_active, service.cluster())
    service.fail_all(reason)


def _api_settings(config: ServerConfig) -> ApiSettings:
    return ApiSettings(
        served_model_names=config.served_model_names,
        model_path=config.model,
        vocab_size=config.model_config.vocab_size,
        created=int(time.time()),
        api_keys=config.api_keys,
        http=fit_connections(config.http, raise_open_files_limit()),
        seed=config.seed,
        sampling=config.sampling_defaults,
    )


def _url(listener: socket.socket) -> str:
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
