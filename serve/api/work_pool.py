"""WorkPool: work that grows with a request's body, off the event loop and within a byte budget.

    up to 4 KiB     at once, on the event loop
    up to 64 KiB    in threads of their own, so that they never wait for larger ones
    larger          in one thread, after the budget has admitted the body

The threads share the interpreter's lock with the event loop. So functions that run here work in
slices of about a millisecond, or in libraries that release the lock.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

from serve.api.byte_budget import ByteBudget, ClientBudgets, ClientLease
from serve.api.memory_trim import MemoryTrim

SMALL_BYTES = 4 << 10
MEDIUM_BYTES = 64 << 10
_NUM_THREADS = 2  # for bodies of medium size; more would only take the lock from each other

Result = TypeVar("Result")


class WorkPool:
    """The threads, and the budget of the bodies that they work on."""

    def __init__(self, budget_bytes: int) -> None:
        self.budget = ByteBudget(budget_bytes)
        self.clients = ClientBudgets(self.budget)
        self._medium = ThreadPoolExecutor(_NUM_THREADS, "body")
        self._large = ThreadPoolExecutor(1, "large body")  # a second one would double the memory
        self._trim = MemoryTrim(self._large)

    async def run(
        self, num_bytes: int, function: Callable[[], Result], lease: ClientLease | None = None
    ) -> Result:
        """Call ``function``, whose work grows with ``num_bytes``, and return what it returns.

        The lease ends with the work, which cannot be interrupted: a cancelled caller does not give
        bytes back while a thread still uses them.
        """
        if num_bytes <= SMALL_BYTES:
            return function()
        is_large = num_bytes > MEDIUM_BYTES
        work = (self._large if is_large else self._medium).submit(function)
        if is_large:
            self._trim.after(work)
        if lease is not None:
            _release_after(work, lease)
        return await asyncio.wrap_future(work)

    def close(self) -> None:
        """Let the threads end when their work is done, and drop what has not begun."""
        self._trim.cancel()
        for threads in (self._medium, self._large):
            threads.shutdown(wait=False, cancel_futures=True)


def _release_after(work: Future[Result], lease: ClientLease) -> None:
    loop = asyncio.get_running_loop()

    def release(_: Future[Result]) -> None:
        if not loop.is_closed():
            loop.call_soon_threadsafe(lease.release)

    work.add_done_callback(release)
