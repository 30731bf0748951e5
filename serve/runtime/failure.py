"""FirstFailure: why the job cannot go on. The first reason is kept; later ones are ignored."""

from __future__ import annotations

import asyncio
import logging
from typing import Any

log = logging.getLogger(__name__)

# A lost rank also breaks the worker of this one. Its lost connection is the better reason, and the
# control channel reports it within this time.
WORKER_BLAME_DELAY_S = 1.0


class JobFailed(Exception):
    """The job cannot go on; the message is one line that says why."""


class RankFailed(JobFailed):
    """Another rank reports that it cannot go on; all connections are intact."""


def first_leaf(error: BaseException) -> BaseException:
    """Return the first exception in nested exception groups, or ``error`` if it is not a group."""
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error


class FirstFailure:
    """Collects the failures of rank ``rank`` on the running event loop.

    It is also the loop's exception handler. asyncio would only log what a callback raises, and the
    message that the callback processed would be lost.
    """

    def __init__(self, rank: int) -> None:
        self._rank = rank
        self._loop = asyncio.get_running_loop()
        self._error: asyncio.Future[JobFailed] = self._loop.create_future()
        self._shutting_down = False
        self._loop.set_exception_handler(self._on_loop_error)

    @property
    def reason(self) -> str:
        """Why the job has failed; empty if it has not."""
        return str(self._error.result()) if self._error.done() else ""

    def fail(self, error: JobFailed) -> None:
        """End the job because of ``error``, unless it already ends for another reason."""
        if not self._shutting_down and not self._error.done():
            self._error.set_result(error)

    def fail_worker(self, error: BaseException) -> None:
        """End the job because the worker raised ``error``, unless a better reason comes soon."""
        self._loop.call_later(WORKER_BLAME_DELAY_S, self._blame_worker, error)

    def start_shutdown(self) -> None:
        """Ignore every failure from now on, because the job ends anyway."""
        self._shutting_down = True

    async def raise_first(self) -> None:
        """Wait for the first failure and raise it."""
        raise await self._error

    def _blame_worker(self, error: BaseException) -> None:
        if not self._shutting_down and not self._error.done():
            log.error("the worker of rank %d failed", self._rank, exc_info=error)
            self.fail(JobFailed(f"{type(error).__name__}: {error}"))

    def _on_loop_error(self, loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        loop.default_exception_handler(context)
        if "handle" in context:  # a callback raised
            self.fail(JobFailed(f"{context['message']}: {context.get('exception')!r}"))
