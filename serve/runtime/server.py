"""Run one rank of the server: rank 0 with HTTP and draining, the others until its Goodbye."""

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
from serve.comm.rendezvous import StartError
from serve.config.server import ServerConfig
from serve.dispatch.service import Service
from serve.protocol.messages import AnyMessage, StopRequest
from serve.runtime.failure import JobFailed, RankFailed, first_leaf
from serve.runtime.join import join_job
from serve.runtime.open_files import fit_connections, raise_open_files_limit
from serve.runtime.rank import RankProcess
from serve.runtime.shutdown import StopSignals
from serve.runtime.startup import FrontEnd, serving_front_end
from serve.topology import RankInfo

log = logging.getLogger("serve")

HTTP_CLOSE_S = 2.0  # how long clients may take to read their last answer or error


async def serve_rank(
    config: ServerConfig, rank_info: RankInfo, listener: socket.socket | None
) -> int:
    """Run this rank until the job ends, and return the exit code of the process.

    Rank 0 passes the socket on which HTTP listens.
    """
    try:
        process = join_job(config, rank_info)
    except StartError as error:
        if listener is not None:  # rank 0 prints it for all
            print(f"serve: error: {error}", file=sys.stderr)
        return 2
    signals = StopSignals()
    signals.install(lambda: process.failure.fail(JobFailed("torchrun has ended")))
    if listener is None:
        return await run_to_end(process, work_until_dismissed(process, signals))
    return await run_to_end(process, _serve(process, listener, signals))


async def run_to_end(process: RankProcess, main: Coroutine[Any, Any, None]) -> int:
    """Run ``main``, which runs ``process``, and return the exit code.

    Where the exit code is not 0, the reason has been printed or sent to rank 0.
    """
    try:
        await main
    except BaseExceptionGroup as group:
        return await _explain_failure(process, first_leaf(group))
    return 0


async def work_until_dismissed(process: RankProcess, signals: StopSignals | None = None) -> None:
    """Run a rank without front end: load, then work until rank 0 sends Goodbye.

    The Goodbye may come while the model is still loading. ``signals`` are passed on to rank 0.
    Raises as ``RankProcess.running`` does.
    """
    async with process.running(None, signals):
        start = asyncio.create_task(_load(process))
        await _wait_for_either(start, process.dismissed.wait())
        if start.done():
            await start
            await process.dismissed.wait()
        start.cancel()
        await process.shut_down()


async def _load(process: RankProcess) -> None:
    await process.load(await process.load_tokenizer(), lambda done, total: None)


# --- rank 0 -------------------------------------------------------------------------------------


async def _serve(process: RankProcess, listener: socket.socket, signals: StopSignals) -> None:
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
            await _wait_for_either(start, signals.first.wait())
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
        await asyncio.wait_for(_wait_for_either(drained, signals.second.wait()), timeout_s)
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


# --- failures -----------------------------------------------------------------------------------


async def _explain_failure(process: RankProcess, error: BaseException) -> int:
    """Print why the job ends or send the reason to rank 0, and return the exit code."""
    # One line is printed for the whole job. So rank 0 dismisses the other ranks, which would
    # otherwise print that they lost their connection to rank 0.
    if process.is_front_end and isinstance(error, ValueError | RankFailed):
        print(f"serve: error: {error}", file=sys.stderr)
        await process.dismiss_ranks()
        return 1 if isinstance(error, RankFailed) else 2
    if isinstance(error, JobFailed):
        print(f"serve: rank {process.rank_info.rank} stops: {error}", file=sys.stderr)
        await process.report_failure(str(error))
        return 1
    if isinstance(error, ValueError):  # the model cannot be served; rank 0 prints the reason
        await process.report_failure(str(error))
        return 0
    log.error("rank %d failed", process.rank_info.rank, exc_info=error)
    await process.report_failure(f"{type(error).__name__}: {error}")
    return 1


async def _wait_for_either(first: asyncio.Task[None], second: Coroutine[Any, Any, Any]) -> None:
    """Wait until one of both ends, then cancel ``second``. ``first`` is the caller's to cancel."""
    other = asyncio.create_task(second)
    try:
        await asyncio.wait((first, other), return_when=asyncio.FIRST_COMPLETED)
    finally:
        other.cancel()
