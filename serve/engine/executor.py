"""The GPU thread: issues every entry of the plan in order and reports the results.

It only issues. Waiter threads wait for the GPU and for transfers. They own no state and call back
into the event loop.
"""

from __future__ import annotations

import asyncio
import queue
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from serve.comm.kv_transfer import KVReceiver, KVSender
from serve.comm.transports import Wait
from serve.engine.plan_progress import PlanProgress
from serve.engine.runner import Runner
from serve.protocol.messages import NUM_STAGING_SLOTS
from serve.protocol.plan import Entry, PostReceive, Send, Step, Stop, Unpack

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class RankResources:
    """The objects that carry out entries. The GPU thread makes them, as it makes all CUDA calls."""

    runner: Runner
    sender: KVSender
    receiver: KVReceiver


@dataclass(frozen=True, slots=True)
class Callbacks:
    """Functions that the executor calls on the event loop."""

    on_step: Callable[[list[int]], None]  # gets the sampled ids; not called on followers
    on_received: Callable[[int, int], None]  # gets the prefill replica and the push's number
    on_failure: Callable[[BaseException], None]


class Executor:
    """Owns the GPU thread, its queue of entries and the waiter threads."""

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        callbacks: Callbacks,
        device: torch.device,
        *,
        num_peers: int,
        progress: PlanProgress,
    ) -> None:
        self._loop = loop
        self._callbacks = callbacks
        self._device = device
        self.progress = progress
        self._queue: queue.SimpleQueue[Entry | Callable[[], None]] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="gpu", daemon=True)
        # One waiter for steps keeps their results in order. One for each push that can be in flight
        # means that no push waits for a free waiter.
        self._step_waiter = ThreadPoolExecutor(1, thread_name_prefix="step waiter")
        self._waiters = ThreadPoolExecutor(
            max_workers=max(1, NUM_STAGING_SLOTS * num_peers), thread_name_prefix="waiter"
        )
        self._resources: RankResources | None = None

    def start(self) -> None:
        self._thread.start()

    def enqueue(self, entry: Entry) -> None:
        """Append ``entry`` to the plan. Any thread may call this; it never blocks."""
        self._queue.put(entry)

    def call(self, function: Callable[[], T]) -> asyncio.Future[T]:
        """Run ``function`` in the GPU thread, after the entries that are queued."""
        future: asyncio.Future[T] = self._loop.create_future()

        def run() -> None:
            try:
                result = function()
            except BaseException as error:  # raised where the future is awaited
                self._loop.call_soon_threadsafe(_fail, future, error)
            else:
                self._loop.call_soon_threadsafe(_succeed, future, result)

        self._queue.put(run)
        return future

    def attach(self, resources: RankResources) -> None:
        """Set the objects that carry out entries. Call it in the GPU thread, before any entry."""
        self._resources = resources
        resources.runner.report_layers(self.progress.advance)

    def _run(self) -> None:
        try:
            if self._device.type == "cuda":
                torch.cuda.set_device(self._device)  # a new thread uses device 0
            while not isinstance(item := self._queue.get(), Stop):
                self.progress.begin(item)
                if callable(item):
                    item()
                else:
                    self._issue(item)
                self.progress.end()
        except BaseException as error:  # without this thread the process must end
            self._loop.call_soon_threadsafe(self._callbacks.on_failure, error)

    def _issue(self, entry: Entry) -> None:
        if self._resources is None:
            raise RuntimeError(f"{type(entry).__name__} came before the model was loaded")
        match entry:
            case Step():
                self._step(self._resources.runner, entry)
            case Send(decode_replica, number, block_ids):
                self._resources.sender.send(decode_replica, number, block_ids)
            case PostReceive(prefill_replica, number, num_blocks):
                waits = self._resources.receiver.post(prefill_replica, number, num_blocks)
                callback = self._callbacks.on_received
                self._wait_then(self._waiters, entry, waits, callback, prefill_replica, number)
            case Unpack(prefill_replica, number, block_ids):
                self._resources.receiver.unpack(prefill_replica, number, block_ids)
            case _:
                raise TypeError(f"the executor does not issue {type(entry).__name__}")

    def _step(self, runner: Runner, step: Step) -> None:
        token_ids = runner.run(step)
        if self._device.type == "cpu":
            if token_ids is not None:
                self._loop.call_soon_threadsafe(self._callbacks.on_step, token_ids.tolist())
            return
        host = None
        if token_ids is not None:
            host = torch.empty_like(token_ids, device="cpu", pin_memory=True)
            host.copy_(token_ids, non_blocking=True)
        event = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
        event.record()
        self._wait_then(self._step_waiter, step, [event.synchronize], self._deliver, host)

    def _deliver(self, token_ids: Tensor | None) -> None:
        """Pass on the ids of a step; followers have none and wait for the sake of progress."""
        if token_ids is not None:
            self._callbacks.on_step(token_ids.tolist())

    def _wait_then(
        self,
        waiters: ThreadPoolExecutor,
        entry: Entry,
        waits: list[Wait],
        callback: Callable[..., None],
        *args: object,
    ) -> None:
        note_result = self.progress.wait_for(entry)

        def wait_for_all() -> None:
            try:
                for wait_for_one in waits:
                    wait_for_one()
                note_result()
            except BaseException as error:  # a broken transfer ends the process
                self._loop.call_soon_threadsafe(self._callbacks.on_failure, error)
            else:
                self._loop.call_soon_threadsafe(callback, *args)

        waiters.submit(wait_for_all)


def _succeed(future: asyncio.Future[T], result: T) -> None:
    if not future.done():
        future.set_result(result)


def _fail(future: asyncio.Future[T], error: BaseException) -> None:
    if not future.done():
        future.set_exception(error)
