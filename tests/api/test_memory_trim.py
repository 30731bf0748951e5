"""MemoryTrim: once after the last large body, and not between two."""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor

import pytest

from serve.api import memory_trim
from serve.api.memory_trim import MemoryTrim, trim


async def test_it_trims_once_after_the_last_work(monkeypatch: pytest.MonkeyPatch) -> None:
    loop, trimmed = asyncio.get_running_loop(), asyncio.Event()
    count = 0

    def count_trim() -> None:
        nonlocal count
        count += 1
        loop.call_soon_threadsafe(trimmed.set)

    monkeypatch.setattr(memory_trim, "trim", count_trim)
    with ThreadPoolExecutor(1) as threads:
        memory = MemoryTrim(threads)
        for quiet_s in [1000.0] * 20 + [0.0]:
            monkeypatch.setattr(memory_trim, "_QUIET_S", quiet_s)
            work = threads.submit(int)
            memory.after(work)
            await asyncio.wrap_future(work)
        await asyncio.wait_for(trimmed.wait(), 30)
        memory.cancel()
    assert count == 1


def test_the_c_library_is_asked() -> None:
    assert trim() in (True, False)  # depends on the platform; it must not fail
