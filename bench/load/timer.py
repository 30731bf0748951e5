"""Timer: waits until a moment of the monotonic clock, to within some 50 us on Linux."""

from __future__ import annotations

import asyncio
import ctypes
import os
import sys
import time

_ABSOLUTE = 1  # TFD_TIMER_ABSTIME


class _Timespec(ctypes.Structure):
    _fields_ = (("seconds", ctypes.c_long), ("nanoseconds", ctypes.c_long))


class _TimerSpec(ctypes.Structure):
    _fields_ = (("interval", _Timespec), ("value", _Timespec))


class Timer:
    """One wait at a time, in one event loop. Use as ``with``.

    Timers of event loops round up to a whole millisecond, so the kernel's timer is used instead:
    a timerfd (timerfd_create(2)) that becomes readable at the moment itself. Elsewhere than on
    Linux it is the event loop's timer. ``OSError`` if the kernel gives no timer.
    """

    def __init__(self) -> None:
        self._fd: int | None = None
        if sys.platform == "linux":
            self._libc = ctypes.CDLL(None, use_errno=True)
            self._fd = self._libc.timerfd_create(time.CLOCK_MONOTONIC, os.O_NONBLOCK | os.O_CLOEXEC)
            self._raise_if(self._fd < 0)

    def __enter__(self) -> Timer:
        return self

    def __exit__(self, *_: object) -> None:
        if self._fd is not None:
            os.close(self._fd)

    async def wait_until(self, time_s: float) -> None:
        """Return at ``time_s`` of the monotonic clock, at once if that has passed."""
        left_s = time_s - time.monotonic()
        if left_s <= 0:
            return
        if self._fd is None:
            await asyncio.sleep(left_s)
            return
        self._arm(self._fd, time_s)
        loop = asyncio.get_running_loop()
        expired: asyncio.Future[None] = loop.create_future()
        loop.add_reader(self._fd, _set, expired)
        try:
            await expired
        finally:
            loop.remove_reader(self._fd)

    def _arm(self, fd: int, time_s: float) -> None:
        """Set the one expiry; this also takes back an earlier one that was not read."""
        whole_s = int(time_s)
        # A value of 0 would disarm the timer, hence at least 1 ns.
        value = _Timespec(whole_s, max(1, int((time_s - whole_s) * 1e9)))
        spec = ctypes.byref(_TimerSpec(_Timespec(0, 0), value))
        self._raise_if(self._libc.timerfd_settime(fd, _ABSOLUTE, spec, None) < 0)

    def _raise_if(self, failed: bool) -> None:
        if failed:
            number = ctypes.get_errno()
            raise OSError(number, os.strerror(number))


def _set(future: asyncio.Future[None]) -> None:
    # The timer stays readable until the waiting task runs and removes the reader.
    if not future.done():
        future.set_result(None)
