"""Monitor: samples the processes of the server and its replicas once a second."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import aiohttp
import psutil

from bench.soak.client import Target
from bench.soak.recipes import COMPLETIONS
from bench.soak.tally import Tally

INTERVAL_S = 1.0
_CLUSTER_S = 2.0
_PROBE_S = 20.0
_PROBE = {"prompt": [1, 2, 3], "max_tokens": 1, "temperature": 0.0}
_REPLICA_FIELDS = (
    "id", "role", "num_blocks", "num_free_blocks",
    "num_waiting", "num_running", "num_receiving", "num_sending",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class RankSample:
    """One rank's process."""

    rank: int
    rss_bytes: int
    uss_bytes: int  # memory that no other process shares
    num_fds: int
    num_threads: int


@dataclass(frozen=True, slots=True)
class Sample:
    """The server at one moment."""

    time_s: float
    num_done: int
    ranks: tuple[RankSample, ...]
    replicas: tuple[Mapping[str, Any], ...]  # of GET /cluster; empty if it did not answer


@dataclass(frozen=True, slots=True)
class Probe:
    """One small request beside the traffic."""

    time_s: float
    latency_s: float | None  # None: it was refused or not answered


class Monitor:
    """Samples until cancelled."""

    def __init__(self, target: Target, pids: Mapping[int, int], tally: Tally) -> None:
        self.samples: list[Sample] = []
        self.probes: list[Probe] = []
        self._target, self._tally = target, tally
        self._processes = {rank: psutil.Process(pid) for rank, pid in pids.items()}

    async def run(self) -> None:
        """Append a sample and a probe every ``INTERVAL_S``, neither waiting for the other."""
        async with self._target.session() as session, asyncio.TaskGroup() as group:
            group.create_task(self._repeat(lambda: self._add_sample(session)))
            group.create_task(self._repeat(lambda: self._add_probe(session)))

    async def _repeat(self, work: Callable[[], Awaitable[None]]) -> None:
        while True:
            begun_s = self._tally.now_s
            await work()
            await asyncio.sleep(max(0.0, begun_s + INTERVAL_S - self._tally.now_s))

    async def _add_sample(self, session: aiohttp.ClientSession) -> None:
        self.samples.append(await self.sample(session))

    async def sample(self, session: aiohttp.ClientSession) -> Sample:
        """Return the state of now."""
        time_s, num_done = self._tally.now_s, self._tally.num_done
        ranks = tuple(
            sample
            for rank, process in self._processes.items()
            if (sample := _sample_rank(rank, process)) is not None
        )
        return Sample(time_s, num_done, ranks, await self._read_cluster(session))

    async def _read_cluster(self, session: aiohttp.ClientSession) -> tuple[dict[str, Any], ...]:
        with suppress(aiohttp.ClientError, OSError, TimeoutError):
            async with asyncio.timeout(_CLUSTER_S), session.get("/cluster") as response:
                if response.status == 200:
                    found = (await response.json())["replicas"]
                    return tuple({name: one[name] for name in _REPLICA_FIELDS} for one in found)
        return ()

    async def _add_probe(self, session: aiohttp.ClientSession) -> None:
        begun_s, latency_s = self._tally.now_s, None
        with suppress(aiohttp.ClientError, OSError, TimeoutError):
            async with (
                asyncio.timeout(_PROBE_S),
                session.post(COMPLETIONS, json=_PROBE) as response,
            ):
                await response.read()
                latency_s = self._tally.now_s - begun_s if response.status == 200 else None
        self.probes.append(Probe(begun_s, latency_s))


def _sample_rank(rank: int, process: psutil.Process) -> RankSample | None:
    try:
        memory = process.memory_full_info()
        return RankSample(rank, memory.rss, memory.uss, process.num_fds(), process.num_threads())
    except psutil.NoSuchProcess:
        return None


def find_ranks(pid: int | None = None) -> dict[int, int]:
    """Return the pids of all ranks below a process (None: this one), by rank."""
    found: dict[int, int] = {}
    for child in psutil.Process(os.getpid() if pid is None else pid).children(recursive=True):
        with suppress(psutil.NoSuchProcess, psutil.AccessDenied):
            environment = child.environ()
            if "RANK" in environment and "LOCAL_RANK" in environment:
                # torch's own helpers inherit the variables; the rank is the first of them.
                found.setdefault(int(environment["RANK"]), child.pid)
    return dict(sorted(found.items()))


def at_rest(replicas: Sequence[Mapping[str, Any]]) -> bool:
    """Return whether no replica has a request."""
    counts = ("num_waiting", "num_running", "num_receiving", "num_sending")
    return bool(replicas) and not any(one[name] for one in replicas for name in counts)
