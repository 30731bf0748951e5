"""Dispatch policies: choose the replicas that prefill and decode a request.

To add a policy, derive a class from ``DispatchPolicy`` and enter it in ``POLICIES``. Its key there
is its name on the command line (``--dispatch-policy``).
"""

from __future__ import annotations

import itertools
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import ClassVar, NamedTuple

from serve.dispatch.replica_state import ReplicaState
from serve.protocol.messages import Report
from serve.request import Request


class Placement(NamedTuple):
    """The ids of the replicas that prefill and decode a request; equal where one does both."""

    prefill: int
    decode: int


class DispatchPolicy(ABC):
    """Chooses replicas on plain data. Each dispatcher has an instance of its own."""

    summary: ClassVar[str]  # completes the help text of --dispatch-policy

    @abstractmethod
    def choose(self, request: Request, replicas: Sequence[ReplicaState]) -> Placement:
        """Return where ``request`` runs. ``replicas`` are in order of their ids: only read them.

        The dispatcher calls this once for each request that it dispatches.
        """

    def on_report(self, report: Report) -> None:  # noqa: B027  # a policy may ignore reports
        """Note a replica's report. Its load is in the ``ReplicaState`` already."""

    def on_finished(self, request: Request, placement: Placement) -> None:  # noqa: B027
        """Note that a request is closed: finished, aborted or failed."""


Pick = Callable[[list[ReplicaState]], ReplicaState]


def _place(replicas: Sequence[ReplicaState], pick_prefill: Pick, pick_decode: Pick) -> Placement:
    prefill = pick_prefill([state for state in replicas if state.prefills])
    if prefill.decodes:  # colocated: the KV stays where it is computed
        return Placement(prefill.info.id, prefill.info.id)
    decode = pick_decode([state for state in replicas if state.decodes])
    return Placement(prefill.info.id, decode.info.id)


class RoundRobin(DispatchPolicy):
    """Takes prefill replicas in turn, and decode replicas in turn."""

    summary = "each replica in turn"

    def __init__(self) -> None:
        self._counter = itertools.count()

    def choose(self, request: Request, replicas: Sequence[ReplicaState]) -> Placement:
        """Return the next replica of either kind."""
        turn = next(self._counter)

        def pick(candidates: list[ReplicaState]) -> ReplicaState:
            return candidates[turn % len(candidates)]

        return _place(replicas, pick, pick)


class LeastNumUnfinishedTokens(DispatchPolicy):
    """Takes the replicas with the least work left; equal ones in turn.

    That is the prefill replica with the fewest prompt tokens to compute, and the decode replica
    whose requests have the fewest tokens of context.
    """

    summary = "the replica with the fewest tokens to work on"

    def __init__(self) -> None:
        self._counter = itertools.count()

    def choose(self, request: Request, replicas: Sequence[ReplicaState]) -> Placement:
        """Return the least loaded replica of either kind."""
        turn = next(self._counter)

        def pick_prefill(candidates: list[ReplicaState]) -> ReplicaState:
            return min(_rotate(candidates, turn), key=_num_unfinished_tokens)

        def pick_decode(candidates: list[ReplicaState]) -> ReplicaState:
            return min(_rotate(candidates, turn), key=lambda state: state.num_decode_tokens)

        return _place(replicas, pick_prefill, pick_decode)


def _rotate(candidates: list[ReplicaState], turn: int) -> list[ReplicaState]:
    start = turn % len(candidates)
    return candidates[start:] + candidates[:start]


def _num_unfinished_tokens(state: ReplicaState) -> int:
    # The load of a replica that also decodes is the sum of both phases.
    return state.num_prefill_tokens + (state.num_decode_tokens if state.decodes else 0)


POLICIES: dict[str, type[DispatchPolicy]] = {
    "round-robin": RoundRobin,
    "least-num-unfinished-tokens": LeastNumUnfinishedTokens,
}
