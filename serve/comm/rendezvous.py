"""Rendezvous: the ranks meet at torchrun's store before they connect to each other.

Each rank leaves an ``Arrival``: the facts that all ranks must agree on, or an error that keeps it
from starting. Rank 0 reads them all and leaves a verdict, which the others wait for. So an error of
one rank, two hosts with different options and a rank that never comes end the job with one line on
rank 0, instead of leaving the others in a collective without a time-out.
"""

from __future__ import annotations

import logging
import socket
import time
from collections.abc import Mapping
from contextlib import suppress
from datetime import timedelta

import msgspec
from torch.distributed import (  # type: ignore[attr-defined]
    HashStore,
    PrefixStore,
    Store,
    TCPStore,
)

from serve.topology import RankInfo

log = logging.getLogger(__name__)

REMIND_S = 30.0  # how often rank 0 logs which ranks are missing
# A rank with an error gives rank 0 this time to print it. If it exited first, torchrun would end
# rank 0 before that.
LINGER_S = 5.0


class StartError(ValueError):
    """The job cannot start. The text is one line that says why and on which rank."""


class Arrival(msgspec.Struct, frozen=True, kw_only=True):
    """One rank's entry in the store. ``facts`` must be equal on all ranks."""

    host: str
    error: str | None = None
    facts: dict[str, str] = {}


class Rendezvous:
    """The meeting of all ranks at one store. Every wait ends after ``timeout_s`` at the latest."""

    def __init__(self, rank_info: RankInfo, store: Store, timeout_s: float) -> None:
        self._rank, self._world_size = rank_info.rank, rank_info.world_size
        self._store = PrefixStore("serve/start", store)
        self._timeout_s = timeout_s

    def arrive(self, facts: Mapping[str, str]) -> None:
        """Wait until all ranks have arrived without an error and with the same facts.

        Raises ``StartError`` on every rank if one has an error, differs, or does not come in time.
        """
        self._leave(Arrival(host=socket.gethostname(), facts=dict(facts)))
        if self._rank != 0:
            self._await_verdict()
            return
        verdict = self._judge()
        self._store.set("verdict", verdict)
        if verdict:
            raise StartError(verdict)

    def report(self, error: str) -> None:
        """Tell rank 0 that this rank cannot start, and give it ``LINGER_S`` to say so."""
        self._leave(Arrival(host=socket.gethostname(), error=error))
        with suppress(StartError):
            self._await_verdict()

    def _leave(self, arrival: Arrival) -> None:
        self._store.set(f"rank {self._rank}", msgspec.json.encode(arrival).decode())
        # Rank 0 waits for these keys, because a store cannot wait for any one of several keys.
        self._store.set(f"arrival {self._store.add('num_arrivals', 1)}", "")

    def _await_verdict(self) -> None:
        try:
            self._store.wait(["verdict"], timedelta(seconds=self._timeout_s))
            verdict = self._store.get("verdict").decode()
        except RuntimeError:  # a time-out, or rank 0 and the store have ended
            verdict = f"rank 0 gave no verdict within {self._timeout_s:g} s"
        if verdict:
            with suppress(RuntimeError):
                self._store.wait(["torchrun ends this rank"], timedelta(seconds=LINGER_S))
            raise StartError(verdict)

    def _judge(self) -> str:
        """Return why the job cannot start, or ''. The first error is known at once."""
        deadline_s = time.monotonic() + self._timeout_s
        arrivals: dict[int, Arrival] = {}
        missing = list(range(self._world_size))
        while missing:
            left_s = deadline_s - time.monotonic()
            if left_s <= 0:
                return f"{_name(missing)} did not start within {self._timeout_s:g} s"
            if not self._wait_for_any(missing, min(left_s, REMIND_S)):
                log.info("waiting for %s to start", _name(missing))
            for rank in [rank for rank in missing if self._store.check([f"rank {rank}"])]:
                arrival = msgspec.json.decode(self._store.get(f"rank {rank}"), type=Arrival)
                if arrival.error is not None:
                    return f"rank {rank} on {arrival.host}: {arrival.error}"
                arrivals[rank] = arrival
                missing.remove(rank)
        return _find_difference(arrivals)

    def _wait_for_any(self, missing: list[int], limit_s: float) -> bool:
        """Wait until a missing rank has arrived. Return False after ``limit_s``."""
        limit_s = max(limit_s, 0.001)  # a store takes 0 ms for no limit
        next_arrival = self._world_size - len(missing) + 1
        try:
            self._store.wait([f"arrival {next_arrival}"], timedelta(seconds=limit_s))
        except RuntimeError:
            return False
        return True


def open_store(rank_info: RankInfo, timeout_s: float) -> Store:
    """Connect to the job's store: torchrun's, or one that rank 0 hosts. One rank needs neither.

    Raises ``StartError`` if it is not reached within ``timeout_s``.
    """
    address = rank_info.store
    if address is None:
        return HashStore()
    try:
        store = TCPStore(
            address.host,
            address.port,
            rank_info.world_size,
            is_master=rank_info.rank == 0 and not address.hosted_by_torchrun,
            timeout=timedelta(seconds=timeout_s),
            wait_for_workers=False,
            multi_tenant=True,
        )
        # A job that torchrun restarts may find the keys of the attempt before.
        return PrefixStore(f"attempt {address.attempt}", store)
    except RuntimeError as error:
        reason = " ".join(str(error).split())
        raise StartError(
            f"rank {rank_info.rank} cannot reach {address.host}:{address.port}, where the ranks "
            f"meet: {reason}"
        ) from None


def _find_difference(arrivals: Mapping[int, Arrival]) -> str:
    first = arrivals[0]
    for rank, arrival in sorted(arrivals.items()):
        for name in sorted(first.facts.keys() | arrival.facts.keys()):
            own, other = first.facts.get(name), arrival.facts.get(name)
            if own != other:
                return (
                    f"rank {rank} on {arrival.host} has {name} {other}, rank 0 has {own}: every "
                    "host needs the same version, options and model"
                )
    return ""


def _name(ranks: list[int]) -> str:
    return f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {', '.join(map(str, ranks))}"
