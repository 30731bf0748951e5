"""Fleet: the processes that send the load together, started at one moment.

The parent sends nothing itself, so that its progress bar and its sampling of the server delay no
request. Each child tells over its own pipe: ``Ready`` once its first bodies can be made, then the
records as they end, then ``Finished``.
"""

from __future__ import annotations

import asyncio
import multiprocessing
import signal
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from multiprocessing.connection import Connection
from typing import Any

import msgspec
import uvloop

from bench.load.client import Target
from bench.load.record import Record
from bench.load.sender import Load, Share
from bench.load.workload import WorkloadOptions

START_DELAY_S = 0.2  # between the last child's Ready and the first request
_BATCH_S = 0.25  # how often a child reports
_READY, _FINISHED = b"ready", b"finished"

_encode = msgspec.msgpack.Encoder().encode
_decode = msgspec.msgpack.Decoder(list[Record]).decode


class LoadFailed(Exception):
    """A load process died; its traceback is on stderr."""


async def run_fleet(
    target: Target,
    options: WorkloadOptions,
    num_processes: int,
    on_start: Callable[[float], None],
    on_end: Callable[[Record], None],
) -> None:
    """Send the whole plan; ``on_start`` is told the start on the monotonic clock.

    Raises ``LoadFailed`` if a process dies. When cancelled the processes are ended.
    """
    context = multiprocessing.get_context("spawn")
    children = []
    try:
        for first in range(num_processes):
            ours, theirs = context.Pipe()
            share = Share(first, num_processes)
            process = context.Process(
                target=_child, args=(theirs, target, options, share), daemon=True
            )
            process.start()
            theirs.close()
            children.append((process, ours))
        await _drive([pipe for _, pipe in children], on_start, on_end)
    finally:
        for process, pipe in children:
            process.terminate()
            process.join()
            pipe.close()


async def _drive(
    pipes: list[Connection],
    on_start: Callable[[float], None],
    on_end: Callable[[Record], None],
) -> None:
    readers = ThreadPoolExecutor(len(pipes), "pipes")
    for pipe in pipes:
        if await _receive(pipe, readers) != _READY:
            raise LoadFailed("a load process spoke out of turn")
    start_s = time.monotonic() + START_DELAY_S
    on_start(start_s)
    for pipe in pipes:
        pipe.send(start_s)

    async def collect(pipe: Connection) -> None:
        while (message := await _receive(pipe, readers)) != _FINISHED:
            for record in _decode(message):
                on_end(record)

    async with asyncio.TaskGroup() as group:
        for pipe in pipes:
            group.create_task(collect(pipe))


async def _receive(pipe: Connection, readers: ThreadPoolExecutor) -> bytes:
    """The next message. The thread that waits for it ends, at the latest, with the child."""
    try:
        return await asyncio.get_running_loop().run_in_executor(readers, pipe.recv_bytes)
    except (EOFError, ConnectionError) as error:
        raise LoadFailed("a load process died; see above") from error


def _child(pipe: Connection, target: Target, options: WorkloadOptions, share: Share) -> None:
    """The whole life of a load process. Ctrl-C reaches it through the parent, which ends it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with suppress(BrokenPipeError):  # the parent is gone, and nobody wants the rest
        uvloop.run(_send_share(pipe, target, options, share))


async def _send_share(
    pipe: Connection, target: Target, options: WorkloadOptions, share: Share
) -> None:
    ended: list[Record] = []
    load = Load(target, options, share, ended.append)
    pipe.send_bytes(_READY)
    start_s: Any = await asyncio.to_thread(pipe.recv)

    over = asyncio.Event()

    async def report() -> None:
        while ended or not over.is_set():
            batch = _encode(ended)
            ended.clear()
            # A parent that is slow to read must not delay the next request.
            await asyncio.to_thread(pipe.send_bytes, batch)
            with suppress(TimeoutError):
                await asyncio.wait_for(over.wait(), _BATCH_S)

    async with asyncio.TaskGroup() as group:
        group.create_task(report())
        await load.run(start_s)
        over.set()
    pipe.send_bytes(_FINISHED)
