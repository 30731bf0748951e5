"""ByteBudget: how many bytes of large bodies may be in memory at a time, and who is next.

``ClientBudgets`` gives each client a part of it: a client that announces large bodies and sends
them slowly would otherwise keep all of the budget from the others.
"""

from __future__ import annotations

import asyncio
import heapq
from dataclasses import dataclass, field

_CLIENT_SHARE = 0.5  # of the budget, for the bodies of one client

# A body that others have overtaken with so many times the budget is next, however large it is.
_MAX_OVERTAKEN = 4


@dataclass(eq=False, slots=True)
class Lease:
    """Bytes that a body may occupy until ``release``, which may be called more than once."""

    budget: ByteBudget
    num_bytes: int

    def release(self) -> None:
        """Give all bytes back."""
        self.shrink(0)

    def shrink(self, num_bytes: int) -> None:
        """Keep ``num_bytes`` and give the others back."""
        freed = self.num_bytes - min(num_bytes, self.num_bytes)
        self.num_bytes -= freed
        if freed:
            self.budget._give_back(freed)


@dataclass(order=True, slots=True)
class _Waiter:
    num_bytes: int
    arrival: int
    granted_before: int = field(compare=False)  # bytes granted to anyone until it came
    turn: asyncio.Future[None] = field(compare=False)


class ByteBudget:
    """Admits bodies while their bytes fit: the smallest waiting one first.

    A body larger than the whole budget is admitted alone. A body asks once, for the most it can
    need, so bodies never wait for each other in a circle.
    """

    def __init__(self, num_bytes: int) -> None:
        self.num_bytes = num_bytes
        self.in_use = 0
        self._granted = 0  # bytes ever
        self._arrivals = 0
        self._waiting: list[_Waiter] = []  # a heap; those whose turn is done are skipped
        self._by_arrival: dict[int, _Waiter] = {}

    @property
    def num_waiting(self) -> int:
        """The number of bodies that wait for their turn."""
        return len(self._by_arrival)

    async def acquire(self, num_bytes: int) -> Lease:
        """Wait for the turn of ``num_bytes``. A cancelled waiter leaves no trace."""
        self._arrivals += 1
        turn = asyncio.get_running_loop().create_future()
        waiter = _Waiter(num_bytes, self._arrivals, self._granted, turn)
        heapq.heappush(self._waiting, waiter)
        self._by_arrival[waiter.arrival] = waiter
        self._admit()
        try:
            await turn
        except asyncio.CancelledError:
            if turn.cancelled():
                self._admit()  # it may have been the one that the others waited for
            else:  # admitted in the same turn of the event loop
                self._give_back(num_bytes)
            raise
        return Lease(self, num_bytes)

    def _give_back(self, num_bytes: int) -> None:
        self.in_use -= num_bytes
        self._admit()

    def _admit(self) -> None:
        while (waiter := self._next()) is not None and self._fits(waiter.num_bytes):
            self.in_use += waiter.num_bytes
            self._granted += waiter.num_bytes
            del self._by_arrival[waiter.arrival]
            waiter.turn.set_result(None)

    def _fits(self, num_bytes: int) -> bool:
        return self.in_use == 0 or self.in_use + num_bytes <= self.num_bytes

    def _next(self) -> _Waiter | None:
        while (oldest := next(iter(self._by_arrival.values()), None)) is not None:
            if not oldest.turn.cancelled():
                break
            del self._by_arrival[oldest.arrival]
        if oldest is None:
            self._waiting.clear()
            return None
        if self._granted - oldest.granted_before > _MAX_OVERTAKEN * self.num_bytes:
            return oldest
        while True:
            smallest = self._waiting[0]
            if smallest.arrival in self._by_arrival and not smallest.turn.cancelled():
                return smallest
            self._by_arrival.pop(smallest.arrival, None)
            heapq.heappop(self._waiting)


@dataclass(eq=False, slots=True)
class ClientLease:
    """A lease of a client's own budget and one of the common budget, which are held together."""

    own: Lease
    common: Lease
    clients: ClientBudgets
    client: str

    def release(self) -> None:
        """Give all bytes back."""
        self.shrink(0)

    def shrink(self, num_bytes: int) -> None:
        """Keep ``num_bytes`` and give the others back."""
        self.common.shrink(num_bytes)
        self.own.shrink(num_bytes)
        self.clients.forget_if_idle(self.client)


class ClientBudgets:
    """Admits bodies to ``common``, of which one client has at most half at a time.

    A body waits for its client's budget first, and for the common one as long as it holds the
    first. What holds the common one waits for nothing, so there is no circle.
    """

    def __init__(self, common: ByteBudget) -> None:
        self._common = common
        self._of_client: dict[str, ByteBudget] = {}

    @property
    def num_clients(self) -> int:
        """The number of clients whose bodies are in work or wait."""
        return len(self._of_client)

    async def acquire(self, num_bytes: int, client: str) -> ClientLease:
        """Wait for the turn of ``num_bytes``. A cancelled waiter leaves no trace."""
        budget = self._of_client.get(client)
        if budget is None:
            budget = ByteBudget(int(_CLIENT_SHARE * self._common.num_bytes))
            self._of_client[client] = budget
        own: Lease | None = None
        try:
            own = await budget.acquire(num_bytes)
            return ClientLease(own, await self._common.acquire(num_bytes), self, client)
        except BaseException:
            if own is not None:
                own.release()
            self.forget_if_idle(client)
            raise

    def forget_if_idle(self, client: str) -> None:
        """Forget a client without bodies, because clients come and go."""
        budget = self._of_client.get(client)
        if budget is not None and budget.in_use == 0 and budget.num_waiting == 0:
            del self._of_client[client]
