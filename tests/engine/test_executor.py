"""The executor's GPU thread: what it cannot issue ends the process instead of being lost."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from types import SimpleNamespace
from typing import cast

import torch

from serve.engine.executor import Callbacks, Executor, RankResources
from serve.engine.plan_progress import PlanProgress
from serve.protocol.messages import Heartbeat
from serve.protocol.plan import Entry


class IdleRunner:
    """A runner that is never run."""

    def report_layers(self, report: Callable[[], None]) -> None: ...


async def failure_of(entry: object, resources: RankResources | None) -> BaseException:
    """Issue ``entry`` on a new executor and return the failure that it reports."""
    loop = asyncio.get_running_loop()
    failed: asyncio.Future[BaseException] = loop.create_future()
    callbacks = Callbacks(lambda ids: None, lambda replica, number: None, failed.set_result)
    executor = Executor(
        loop, callbacks, torch.device("cpu"), num_peers=0, progress=PlanProgress({})
    )
    if resources is not None:
        executor.attach(resources)
    executor.start()
    executor.enqueue(cast("Entry", entry))
    return await asyncio.wait_for(failed, 30)


async def test_an_entry_that_it_does_not_know_is_a_failure() -> None:
    unused = cast("RankResources", SimpleNamespace(runner=IdleRunner(), sender=None, receiver=None))
    error = await failure_of(Heartbeat(), unused)
    assert isinstance(error, TypeError)
    assert "Heartbeat" in str(error)


async def test_an_entry_before_the_model_is_a_failure() -> None:
    error = await failure_of(Heartbeat(), None)
    assert isinstance(error, RuntimeError)
    assert "before the model" in str(error)
