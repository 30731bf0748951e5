"""Tally: what a soak has sent and got so far, and which floods were on when."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

MAX_WRONG_KEPT = 20
GRACE_S = 5.0  # after a flood, in which the server may still refuse others


@dataclass(frozen=True, slots=True)
class Phase:
    """The time of one flood, in seconds since the start of the run."""

    name: str
    start_s: float
    end_s: float


class Tally:
    """Counts of one run. Used on one event loop."""

    def __init__(self) -> None:
        self.started_s = time.monotonic()
        self.num_done = 0  # requests of the mixed traffic
        self.kinds: Counter[str] = Counter()
        self.statuses: Counter[str] = Counter()  # of the mixed traffic
        self.flood_statuses: dict[str, Counter[str]] = {}
        self.phases: list[Phase] = []
        self.num_wrong = 0
        self.wrong: list[str] = []  # the first ones
        self._num_floods = 0
        self._flooded_until_s = 0.0
        self._waiting: dict[int, asyncio.Event] = {}  # by the number of requests waited for

    @property
    def now_s(self) -> float:
        """Seconds since the start of the run."""
        return time.monotonic() - self.started_s

    @property
    def flooded(self) -> bool:
        """Whether a flood is on, or was a moment ago."""
        return self._num_floods > 0 or self.now_s < self._flooded_until_s

    def add_done(self, kind: str, status: str) -> None:
        """Count a request of the mixed traffic that has ended."""
        self.kinds[kind] += 1
        self.statuses[status] += 1
        self.num_done += 1
        if (event := self._waiting.pop(self.num_done, None)) is not None:
            event.set()

    async def reached(self, number: int) -> None:
        """Wait until ``number`` requests have ended."""
        if self.num_done < number:
            await self._waiting.setdefault(number, asyncio.Event()).wait()

    def describe(self) -> str:
        """Return the progress in one line."""
        return f"{self.now_s:.0f} s: {self.num_done} requests, {self.num_wrong} wrong"

    def add_wrong(self, what: str) -> None:
        """Count a wrong answer."""
        self.num_wrong += 1
        if len(self.wrong) < MAX_WRONG_KEPT:
            self.wrong.append(f"at {self.now_s:.1f} s, {what}")

    @contextmanager
    def flood(self, name: str) -> Iterator[Counter[str]]:
        """Note that a flood is on. Yields the counter of its outcomes."""
        start_s = self.now_s
        self._num_floods += 1
        try:
            yield self.flood_statuses.setdefault(name, Counter())
        finally:
            self._num_floods -= 1
            self._flooded_until_s = self.now_s + GRACE_S
            self.phases.append(Phase(name, start_s, self.now_s))
