"""The timer of planned sends: never early, at once for a past moment, usable after a cancel."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Coroutine
from contextlib import suppress
from typing import Any

import pytest
import uvloop

from bench.load.timer import Timer

RUNNERS: list[Callable[[Coroutine[Any, Any, None]], None]] = [asyncio.run, uvloop.run]


@pytest.mark.parametrize("run", RUNNERS, ids=["asyncio", "uvloop"])
def test_waits_end_at_their_moment_and_never_before(
    run: Callable[[Coroutine[Any, Any, None]], None],
) -> None:
    late_s: list[float] = []

    async def wait_often() -> None:
        with Timer() as timer:
            for _ in range(20):
                due_s = time.monotonic() + 0.003
                await timer.wait_until(due_s)
                late_s.append(time.monotonic() - due_s)

    run(wait_often())
    assert min(late_s) >= 0
    assert min(late_s) < 0.001  # the others may have waited for a processor


async def test_a_moment_that_has_passed_is_not_waited_for() -> None:
    with Timer() as timer:
        async with asyncio.timeout(5):
            await timer.wait_until(time.monotonic() - 1)


async def test_a_cancelled_wait_leaves_the_timer_usable() -> None:
    with Timer() as timer:
        with suppress(TimeoutError):
            async with asyncio.timeout(0.01):
                await timer.wait_until(time.monotonic() + 600)
        due_s = time.monotonic() + 0.01
        async with asyncio.timeout(5):
            await timer.wait_until(due_s)
        assert time.monotonic() >= due_s
