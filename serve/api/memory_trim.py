"""MemoryTrim: give the memory of large bodies back to the system when no more of them come.

glibc keeps what a thread has freed for that thread. After a few bodies of some MiB, which take many
times as much while they are tokenised, a process would stay hundreds of MiB larger.
"""

from __future__ import annotations

import asyncio
import ctypes
import sys
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

_QUIET_S = 1.0  # trimming takes milliseconds, so not between two bodies


class MemoryTrim:
    """Trims in ``threads`` a second after the last of the noted work."""

    def __init__(self, threads: ThreadPoolExecutor) -> None:
        self._threads = threads
        self._timer: asyncio.TimerHandle | None = None

    def after(self, work: Future[Any]) -> None:
        """Trim some time after ``work``, unless other work comes first."""
        loop = asyncio.get_running_loop()
        self.cancel()

        def restart(_: Future[Any]) -> None:
            if not loop.is_closed():
                loop.call_soon_threadsafe(self._restart, loop)

        work.add_done_callback(restart)

    def cancel(self) -> None:
        """Do not trim for the work noted so far."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _restart(self, loop: asyncio.AbstractEventLoop) -> None:
        self.cancel()
        self._timer = loop.call_later(_QUIET_S, self._submit)

    def _submit(self) -> None:
        self._timer = None
        self._threads.submit(trim)


def trim() -> bool:
    """Return freed memory to the system. Return whether the C library can; glibc can."""
    if sys.platform != "linux" or not hasattr(_libc := ctypes.CDLL(None), "malloc_trim"):
        return False
    _libc.malloc_trim(0)  # without the interpreter's lock
    return True
