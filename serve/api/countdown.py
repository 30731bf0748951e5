"""Countdown: call a function when nothing has happened for a while."""

from __future__ import annotations

import asyncio
from collections.abc import Callable


class Countdown:
    """Calls ``expired`` once, ``timeout_s`` after the last ``start``, unless ``stop`` comes before.

    ``start`` is cheap: a running timer is kept, and set anew only when it fires too early.
    """

    __slots__ = ("_due_s", "_expired", "_loop", "_timer", "timeout_s")

    def __init__(
        self, loop: asyncio.AbstractEventLoop, timeout_s: float, expired: Callable[[], None]
    ) -> None:
        self.timeout_s = timeout_s
        self._loop = loop
        self._expired = expired
        self._due_s: float | None = None
        self._timer: asyncio.TimerHandle | None = None

    @property
    def running(self) -> bool:
        """Whether it will call ``expired``."""
        return self._due_s is not None

    def start(self) -> None:
        """Begin to count, or begin again."""
        self._due_s = self._loop.time() + self.timeout_s
        if self._timer is None:
            self._timer = self._loop.call_at(self._due_s, self._check)

    def stop(self) -> None:
        """Do not call ``expired`` until ``start`` is called again."""
        self._due_s = None

    def cancel(self) -> None:
        """Stop for good, and let go of the timer."""
        self._due_s = None
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _check(self) -> None:
        self._timer = None
        if self._due_s is None:
            return
        if self._loop.time() < self._due_s:
            self._timer = self._loop.call_at(self._due_s, self._check)
            return
        self._due_s = None
        self._expired()
