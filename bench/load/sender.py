"""Sender: sends one process's share of a plan at the planned times and records every request."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice

from bench.load.client import Client, Target
from bench.load.prompts import PromptMaker
from bench.load.record import Record
from bench.load.timer import Timer
from bench.load.workload import PlannedRequest, WorkloadOptions, make_plan

_NUM_AHEAD = 32  # bodies that are made before their send time


@dataclass(frozen=True, slots=True)
class Share:
    """Requests ``first, first + step, ...`` of a plan. All shares together are the plan."""

    first: int = 0
    step: int = 1

    def of(self, plan: Sequence[PlannedRequest]) -> Sequence[PlannedRequest]:
        return plan[self.first :: self.step]

    def of_count(self, count: int) -> int:
        """Return how many of ``count`` concurrency slots belong to this share."""
        return len(range(self.first, count, self.step))


class Sender:
    """Sends one share. ``on_end`` gets the record of each request when it completes or fails."""

    def __init__(
        self,
        target: Target,
        options: WorkloadOptions,
        share: Share,
        on_end: Callable[[Record], None],
    ) -> None:
        self._target, self._options, self._share, self._on_end = target, options, share, on_end
        self._requests = share.of(make_plan(options))
        self._maker = PromptMaker(options.seed, *options.token_ids)

    async def run(self, start_s: float) -> None:
        """Send all requests, the first at ``start_s`` of the monotonic clock; await the answers."""
        async with Client(self._target) as client:
            if self._options.arrivals == "closed":
                await self._run_closed(client, start_s)
            else:
                await self._run_open(client, start_s)

    async def _run_open(self, client: Client, start_s: float) -> None:
        with Timer() as timer:
            async with asyncio.TaskGroup() as group:
                async for request, body in self._bodies():
                    assert request.send_s is not None
                    scheduled_s = start_s + request.send_s
                    await timer.wait_until(scheduled_s)
                    group.create_task(self._send(client, request, body, scheduled_s))

    async def _run_closed(self, client: Client, start_s: float) -> None:
        with Timer() as timer:
            await timer.wait_until(start_s)
        bodies = self._bodies()

        async def slot() -> None:
            async for request, body in bodies:
                await self._send(client, request, body, time.monotonic())

        async with asyncio.TaskGroup() as group:
            for _ in range(self._share.of_count(self._options.concurrency or 1)):
                group.create_task(slot())

    async def _send(
        self, client: Client, request: PlannedRequest, body: bytes, scheduled_s: float
    ) -> None:
        record = Record(
            index=request.index,
            scheduled_s=scheduled_s,
            sent_s=scheduled_s,
            num_prompt_tokens=request.input_len or 0,
            max_tokens=request.max_tokens,
        )
        self._on_end(await client.send(record, body))

    def _bodies(self) -> _Bodies:
        def make(request: PlannedRequest) -> bytes:
            return self._target.body(request.make_prompt(self._maker), request.max_tokens)

        return _Bodies(self._requests, make)


class _Bodies:
    """Iterates over the requests and their bodies.

    A thread makes the bodies ahead of their send times, because encoding a long prompt on the
    event loop would delay the sends and the receipt of tokens.
    """

    def __init__(
        self, requests: Sequence[PlannedRequest], make: Callable[[PlannedRequest], bytes]
    ) -> None:
        self._requests, self._make = iter(requests), make
        self._pool = ThreadPoolExecutor(1, "bodies")
        self._ahead: deque[tuple[PlannedRequest, Future[bytes]]] = deque()

    def __aiter__(self) -> _Bodies:
        return self

    async def __anext__(self) -> tuple[PlannedRequest, bytes]:
        for request in islice(self._requests, _NUM_AHEAD - len(self._ahead)):
            self._ahead.append((request, self._pool.submit(self._make, request)))
        if not self._ahead:
            self._pool.shutdown(wait=False)
            raise StopAsyncIteration
        request, body = self._ahead.popleft()
        return request, await asyncio.wrap_future(body)
