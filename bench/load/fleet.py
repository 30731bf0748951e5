"""Fleet: the processes that send one load together, all from the same start time.

The parent sends no requests, because its progress bar and its monitoring of the server would delay
them. Each child writes to its own pipe: ``_READY`` once its plan is made, then batches of records
of requests that have ended, then ``_FINISHED``. After the last ``_READY`` the parent writes the
start time to every pipe. ``_STOP`` after that ends the load early: the child drops the requests
that have not ended, and writes its last records.
"""

from __future__ import annotations

import asyncio
import multiprocessing
import signal
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from multiprocessing.connection import Connection
from typing import Any

import msgspec
import uvloop

from bench.load.client import Target
from bench.load.record import Record
from bench.load.sender import Sender, Share
from bench.load.workload import WorkloadOptions

START_DELAY_S = 0.2  # between the last child's _READY and the first request
_BATCH_S = 0.25  # between two batches of records of a child
_READY, _FINISHED, _STOP = b"ready", b"finished", "stop"

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
    stop: asyncio.Event,
) -> None:
    """Send the whole plan from ``num_processes`` processes, or until ``stop``.

    ``on_start`` gets the start time on the monotonic clock, ``on_end`` each record when its request
    has ended; after ``stop`` also those that the processes still hold. Raises ``LoadFailed`` if a
    process dies. Cancelling this ends the processes.
    """
    context = multiprocessing.get_context("spawn")
    children = []
    try:
        for first in range(num_processes):
            parent_end, child_end = context.Pipe()
            share = Share(first, num_processes)
            process = context.Process(
                target=_child, args=(child_end, target, options, share), daemon=True
            )
            process.start()
            child_end.close()  # otherwise the death of the child would not end the pipe
            children.append((process, parent_end))
        await _drive([pipe for _, pipe in children], on_start, on_end, stop)
    finally:
        for process, pipe in children:
            process.terminate()
            process.join()
            pipe.close()


async def _drive(
    pipes: list[Connection],
    on_start: Callable[[float], None],
    on_end: Callable[[Record], None],
    stop: asyncio.Event,
) -> None:
    readers = ThreadPoolExecutor(len(pipes), "pipes")
    for pipe in pipes:
        if await _receive(pipe, readers) != _READY:
            raise LoadFailed("a load process sent records before it was ready")
    start_s = time.monotonic() + START_DELAY_S
    on_start(start_s)
    for pipe in pipes:
        pipe.send(start_s)

    async def collect(pipe: Connection) -> None:
        while (message := await _receive(pipe, readers)) != _FINISHED:
            for record in _decode(message):
                on_end(record)

    async def pass_on_stop() -> None:
        await stop.wait()
        for pipe in pipes:
            with suppress(OSError):  # a child that has finished
                pipe.send(_STOP)

    async with asyncio.TaskGroup() as group:
        stopping = group.create_task(pass_on_stop())
        collecting = [group.create_task(collect(pipe)) for pipe in pipes]
        await asyncio.gather(*collecting)
        stopping.cancel()


async def _receive(pipe: Connection, readers: ThreadPoolExecutor) -> bytes:
    """Receive the next message. The waiting thread ends with the child at the latest."""
    try:
        return await asyncio.get_running_loop().run_in_executor(readers, pipe.recv_bytes)
    except (EOFError, ConnectionError) as error:
        raise LoadFailed("a load process died; its traceback is above") from error


def _child(pipe: Connection, target: Target, options: WorkloadOptions, share: Share) -> None:
    """Run a load process. It ignores Ctrl-C, because the parent ends it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with suppress(BrokenPipeError):  # the parent has ended, so the records are not needed
        uvloop.run(_send_share(pipe, target, options, share))


async def _send_share(
    pipe: Connection, target: Target, options: WorkloadOptions, share: Share
) -> None:
    ended: list[Record] = []
    sender = Sender(target, options, share, ended.append)
    pipe.send_bytes(_READY)
    start_s: Any = await asyncio.to_thread(pipe.recv)

    all_ended = asyncio.Event()

    async def report() -> None:
        while ended or not all_ended.is_set():
            batch = _encode(ended)
            ended.clear()
            # In a thread, because a parent that reads slowly must not delay the next request.
            await asyncio.to_thread(pipe.send_bytes, batch)
            with suppress(TimeoutError):
                await asyncio.wait_for(all_ended.wait(), _BATCH_S)

    async with asyncio.TaskGroup() as group:
        group.create_task(report())
        sending = group.create_task(sender.run(start_s))
        with _calling_when_readable(pipe, sending.cancel):  # _STOP, or the end of the parent
            await asyncio.wait([sending])
        all_ended.set()
    pipe.send_bytes(_FINISHED)


@contextmanager
def _calling_when_readable(pipe: Connection, call: Callable[[], object]) -> Iterator[None]:
    """Call once when ``pipe`` has a message or is closed, while the body runs."""
    loop = asyncio.get_running_loop()

    def on_readable() -> None:
        loop.remove_reader(pipe.fileno())
        call()

    loop.add_reader(pipe.fileno(), on_readable)
    try:
        yield
    finally:
        loop.remove_reader(pipe.fileno())
