"""Where a request is prefilled and where it is decoded: a function per policy, on plain data."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

from serve.dispatch.replica_state import ReplicaState
from serve.request import Request


class Choice(NamedTuple):
    """Replica ids; the same one twice where a replica does both."""

    prefill: int
    decode: int


class PolicyInput(NamedTuple):
    """What a policy may look at. ``number`` counts the requests dispatched before."""

    request: Request
    replicas: Sequence[ReplicaState]
    number: int


Policy = Callable[[PolicyInput], Choice]


def round_robin(given: PolicyInput) -> Choice:
    """Each in turn, on both sides."""

    def pick(candidates: list[ReplicaState]) -> ReplicaState:
        return candidates[given.number % len(candidates)]

    return _choose(given, pick, pick)


def least_num_unfinished_tokens(given: PolicyInput) -> Choice:
    """The prefill replica with the fewest prompt tokens to compute, the decode replica with the
    smallest context to read; where they are equal, each in turn.
    """

    def rotated(candidates: list[ReplicaState]) -> list[ReplicaState]:
        start = given.number % len(candidates)
        return candidates[start:] + candidates[:start]

    def pick_prefill(candidates: list[ReplicaState]) -> ReplicaState:
        return min(rotated(candidates), key=_num_unfinished_tokens)

    def pick_decode(candidates: list[ReplicaState]) -> ReplicaState:
        return min(rotated(candidates), key=lambda state: state.num_decode_tokens)

    return _choose(given, pick_prefill, pick_decode)


def _num_unfinished_tokens(state: ReplicaState) -> int:
    # A replica that also decodes is as busy as both phases make it.
    return state.num_prefill_tokens + (state.num_decode_tokens if state.decodes else 0)


def _choose(
    given: PolicyInput,
    pick_prefill: Callable[[list[ReplicaState]], ReplicaState],
    pick_decode: Callable[[list[ReplicaState]], ReplicaState],
) -> Choice:
    prefill = pick_prefill([state for state in given.replicas if state.prefills])
    if prefill.decodes:  # colocated: the KV stays where it is computed
        return Choice(prefill.info.id, prefill.info.id)
    decode = pick_decode([state for state in given.replicas if state.decodes])
    return Choice(prefill.info.id, decode.info.id)


POLICIES: dict[str, Policy] = {
    "round-robin": round_robin,
    "least-num-unfinished-tokens": least_num_unfinished_tokens,
}
