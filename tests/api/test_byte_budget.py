"""ByteBudget: order of admission, bounds, cancelled waiters."""

from __future__ import annotations

import asyncio
import random

import pytest

from serve.api.byte_budget import ByteBudget, ClientBudgets, ClientLease, Lease


class Crowd:
    """Bodies that ask for bytes, by name, and the order in which they were admitted."""

    def __init__(self, budget: ByteBudget) -> None:
        self.budget = budget
        self.admitted: dict[str, Lease] = {}
        self.tasks: dict[str, asyncio.Task[None]] = {}

    async def ask(self, name: str, num_bytes: int) -> None:
        self.tasks[name] = asyncio.create_task(self._wait(name, num_bytes))
        await settle()

    async def free(self, name: str) -> None:
        self.admitted[name].release()
        await settle()

    async def _wait(self, name: str, num_bytes: int) -> None:
        self.admitted[name] = await self.budget.acquire(num_bytes)


async def settle() -> None:
    for _ in range(5):
        await asyncio.sleep(0)


async def test_the_smallest_waiting_body_is_next() -> None:
    crowd = Crowd(ByteBudget(100))
    await crowd.ask("first", 90)
    await crowd.ask("large", 60)
    await crowd.ask("small", 20)
    await crowd.ask("tiny", 5)
    assert list(crowd.admitted) == ["first", "tiny"]
    await crowd.free("first")
    assert list(crowd.admitted) == ["first", "tiny", "small", "large"]
    assert crowd.budget.in_use == 85


async def test_a_body_larger_than_the_budget_runs_alone() -> None:
    crowd = Crowd(ByteBudget(100))
    await crowd.ask("small", 10)
    await crowd.ask("huge", 500)
    assert "huge" not in crowd.admitted
    await crowd.free("small")
    assert crowd.budget.in_use == 500
    await crowd.ask("next", 1)
    assert "next" not in crowd.admitted
    await crowd.free("huge")
    assert "next" in crowd.admitted


async def test_a_large_body_is_not_overtaken_for_ever() -> None:
    crowd = Crowd(ByteBudget(100))
    await crowd.ask("running 0", 60)
    await crowd.ask("large", 100)
    for i in range(1, 20):
        await crowd.ask(f"running {i}", 60)
    for i in range(20):
        if "large" in crowd.admitted:
            break
        await crowd.free(f"running {i}")
    assert list(crowd.admitted).index("large") == 8  # after more than four budgets


async def test_a_cancelled_waiter_leaves_no_trace() -> None:
    crowd = Crowd(ByteBudget(100))
    await crowd.ask("running", 100)
    await crowd.ask("gone", 10)
    await crowd.ask("waiting", 100)
    crowd.tasks["gone"].cancel()
    await settle()
    assert crowd.budget.num_waiting == 1
    await crowd.free("running")
    assert list(crowd.admitted) == ["running", "waiting"]


async def test_shrinking_admits_others() -> None:
    crowd = Crowd(ByteBudget(100))
    await crowd.ask("unknown", 100)
    await crowd.ask("next", 60)
    crowd.admitted["unknown"].shrink(30)
    await settle()
    assert crowd.budget.in_use == 90
    crowd.admitted["unknown"].release()
    crowd.admitted["unknown"].release()
    assert crowd.budget.in_use == 60


@pytest.mark.parametrize("seed", range(5))
async def test_random_crowds_stay_within_the_budget(seed: int) -> None:
    print("seed", seed)
    rng = random.Random(seed)
    budget = ByteBudget(1000)
    num_done = 0

    async def body() -> None:
        nonlocal num_done
        size = rng.randint(1, 1500)
        lease = await budget.acquire(size)
        assert budget.in_use <= 1000 or budget.in_use == size
        try:
            await asyncio.sleep(0)
        finally:
            lease.release()
        num_done += 1

    tasks = [asyncio.create_task(body()) for _ in range(300)]
    await settle()
    gone = rng.sample(tasks, 60)
    for task in gone:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    assert num_done >= 240
    assert (budget.in_use, budget.num_waiting) == (0, 0)


class TwoClients:
    """Bodies of clients ``a`` and ``b``, as ``a1``, and those that were admitted."""

    def __init__(self) -> None:
        self.common = ByteBudget(100)
        self.budgets = ClientBudgets(self.common)
        self.admitted: dict[str, ClientLease] = {}
        self.tasks: dict[str, asyncio.Task[None]] = {}

    async def ask(self, name: str, num_bytes: int) -> None:
        self.tasks[name] = asyncio.create_task(self._wait(name, num_bytes))
        await settle()

    async def _wait(self, name: str, num_bytes: int) -> None:
        self.admitted[name] = await self.budgets.acquire(num_bytes, name[0])


async def test_one_client_leaves_half_to_the_others() -> None:
    clients = TwoClients()
    for name in ("a1", "a2", "a3"):
        await clients.ask(name, 25)
    await clients.ask("b1", 50)
    assert list(clients.admitted) == ["a1", "a2", "b1"]
    clients.admitted["a1"].shrink(5)
    await settle()
    assert "a3" not in clients.admitted
    clients.admitted["a1"].release()
    await settle()
    assert "a3" in clients.admitted
    for name in ("a2", "a3", "b1"):
        clients.admitted[name].release()
    assert (clients.common.in_use, clients.budgets.num_clients) == (0, 0)


async def test_a_client_that_is_gone_leaves_no_trace() -> None:
    clients = TwoClients()
    await clients.ask("a1", 50)
    await clients.ask("b1", 40)
    await clients.ask("a2", 30)  # waits for a's own half
    await clients.ask("c1", 20)  # waits for the common budget
    assert list(clients.admitted) == ["a1", "b1"]
    for name in ("a2", "c1"):
        clients.tasks[name].cancel()
    await settle()
    assert clients.common.in_use == 90
    assert clients.budgets.num_clients == 2
    for name in ("a1", "b1"):
        clients.admitted[name].release()
    assert (clients.common.in_use, clients.budgets.num_clients) == (0, 0)
