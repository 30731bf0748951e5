"""A rank as a server: rank 0 with HTTP, dispatch and draining; the others until it says Goodbye."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
import sys
import time
from collections.abc import Coroutine
from typing import Any

from tqdm import tqdm

from serve.api.app import create_app, run_app_on
from serve.api.settings import ApiSettings
from serve.config.server import ServerConfig
from serve.dispatch.metrics import Metrics
from serve.dispatch.service import Service
from serve.runtime.failure import JobFailed, RankFailed
from serve.runtime.rank import RankProcess, join_job
from serve.runtime.shutdown import StopSignals
from serve.runtime.startup import FrontEnd, describe, fit_max_model_len, make_front
from serve.tokenizer.tokenizer import Tokenizer
from serve.topology import RankInfo

log = logging.getLogger("serve")

FAREWELL_S = 2.0  # how long clients of a failed job may take to read their error


async def serve_rank(
    config: ServerConfig, rank_info: RankInfo, listener: socket.socket | None
) -> int:
    """Run this rank until the job ends; the process's exit code."""
    process = join_job(config, rank_info)
    signals = StopSignals()
    signals.install(lambda: process.failure.fail(JobFailed("torchrun is gone")))
    main = follow(process) if listener is None else _serve(process, listener, signals)
    return await run_to_end(process, main)


async def run_to_end(process: RankProcess, main: Coroutine[Any, Any, None]) -> int:
    """Run ``main`` on ``node``; the process's exit code, after saying why if it is not 0."""
    try:
        await process.run(main)
    except BaseExceptionGroup as group:
        return await _report_failure(process, _first_leaf(group))
    return 0


async def _report_failure(process: RankProcess, error: BaseException) -> int:
    """Say why the job ends: on rank 0 to the user, elsewhere to rank 0, which passes it on."""
    # The others are not to add what they make of rank 0's end to the one line that says why.
    if process.is_front_end and isinstance(error, ValueError | RankFailed):
        print(f"serve: error: {error}", file=sys.stderr)
        await process.dismiss_ranks()
        return 1 if isinstance(error, RankFailed) else 2
    if isinstance(error, JobFailed):
        print(f"serve: rank {process.rank_info.rank} stops: {error}", file=sys.stderr)
        await process.report_failure(str(error))
        return 1
    if isinstance(error, ValueError):  # cannot be served as asked; rank 0 says so
        await process.report_failure(str(error))
        return 0
    log.error("rank %d failed", process.rank_info.rank, exc_info=error)
    await process.report_failure(f"{type(error).__name__}: {error}")
    return 1


def _first_leaf(error: BaseException) -> BaseException:
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error


async def follow(process: RankProcess) -> None:
    """Any rank but 0: load, then work until rank 0 says Goodbye, which may be before."""
    start = asyncio.create_task(_load(process))
    await _either(start, process.dismissed.wait())
    if start.done():
        await start
        await process.dismissed.wait()
    start.cancel()
    await process.shut_down()


async def _load(process: RankProcess) -> None:
    await process.load(await process.load_tokenizer(), lambda done, total: None)


async def _serve(process: RankProcess, listener: socket.socket, signals: StopSignals) -> None:
    """Rank 0: HTTP as soon as it can, requests once all are ready, draining at the end."""
    metrics = Metrics(process.config.served_model_names[0])
    front = make_front(process.config, process.topology, metrics, process.channel.send)
    process.tell_front = front.on_message
    tokenizer = await process.load_tokenizer()
    settings = _api_settings(process.config)
    app = create_app(front.service, tokenizer, metrics, settings)
    runner = await run_app_on(app, listener)
    log.info("listening on %s", _url(listener))
    try:
        start = asyncio.create_task(_get_ready(process, front, tokenizer))
        await _either(start, signals.first.wait())
        if start.done():
            await start
            await signals.first.wait()
        start.cancel()
        await _drain(front.service, signals, process.config.drain_timeout_s)
    except asyncio.CancelledError:  # the job has failed: every open stream gets its error
        _fail_all(front.service, process.failure.reason)
        raise
    finally:
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(runner.cleanup(), FAREWELL_S)
    await process.shut_down()


def _fail_all(service: Service, reason: str) -> None:
    if service.ready:
        log.error("%d requests are open; replicas: %s", service.num_active, service.cluster())
    service.fail_all(reason)


def _url(listener: socket.socket) -> str:
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def _api_settings(config: ServerConfig) -> ApiSettings:
    return ApiSettings(
        served_model_names=config.served_model_names,
        model_path=config.model,
        vocab_size=config.model_config.vocab_size,
        created=int(time.time()),
        api_key=config.api_key,
        seed=config.seed,
        sampling=config.sampling_defaults,
    )


async def _either(first: asyncio.Task[None], second: Coroutine[Any, Any, Any]) -> None:
    """Wait for whichever ends first; the second is given up then."""
    other = asyncio.create_task(second)
    try:
        await asyncio.wait((first, other), return_when=asyncio.FIRST_COMPLETED)
    finally:
        other.cancel()


async def _get_ready(process: RankProcess, front: FrontEnd, tokenizer: Tokenizer | None) -> None:
    """Load, wait for every rank, and open the doors."""
    with tqdm(desc="loading weights", unit="tensor", disable=None, file=sys.stderr) as bar:

        def progress(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        await process.load(tokenizer, progress)
    num_blocks = await front.gather()
    block_size = process.setup.block_size
    max_model_len = fit_max_model_len(process.config, block_size, num_blocks)
    front.service.set_ready(max_model_len, block_size, num_blocks)
    log.info("replicas: %s", describe(process.topology, block_size, num_blocks))
    log.info("ready: contexts of up to %d tokens", max_model_len)


async def _drain(service: Service, signals: StopSignals, timeout_s: float) -> None:
    """Refuse new requests, and give the open ones until the time-out or a second signal."""
    log.info("stopping; %d requests are still open", service.num_active)
    service.start_draining()
    drained = asyncio.create_task(service.drained())
    with contextlib.suppress(TimeoutError):
        await asyncio.wait_for(_either(drained, signals.second.wait()), timeout_s)
    drained.cancel()
    service.fail_all("the server is shutting down")
