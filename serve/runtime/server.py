"""Run one rank of the server until the job ends: rank 0 with HTTP, the others until its Goodbye."""

from __future__ import annotations

import asyncio
import logging
import socket
import sys
from collections.abc import Coroutine
from typing import Any

from serve.comm.rendezvous import StartError
from serve.config.server import ServerConfig
from serve.runtime.failure import JobFailed, RankFailed, first_leaf
from serve.runtime.join import join_job
from serve.runtime.rank import RankProcess
from serve.runtime.shutdown import StopSignals, wait_for_either
from serve.topology import RankInfo

log = logging.getLogger("serve")


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
    # Only here, because the other ranks have no use for an HTTP server.
    from serve.runtime.http import serve_http

    return await run_to_end(process, serve_http(process, listener, signals))


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
        await wait_for_either(start, process.dismissed.wait())
        if start.done():
            await start
            await process.dismissed.wait()
        start.cancel()
        await process.shut_down()


async def _load(process: RankProcess) -> None:
    await process.load(await process.load_tokenizer(), lambda done, total: None)


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
