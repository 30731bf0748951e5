"""The cluster on rank 0: where each request went and what came of it. It returns messages.

A request, as rank 0 sees it::

    dispatch() -> waiting --token 0--> streaming --last token--> closed
                    |                     |
                    +----- close() -------+-------------------> closed: its replicas are told

Token 0 and the others have different senders, so later tokens may come first; they are held. Tokens
of a closed request are answered with another Abort: the first one may have overtaken its request.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from serve.dispatch.output import Output
from serve.dispatch.policies import POLICIES, Choice, PolicyInput
from serve.dispatch.replica_state import ReplicaState
from serve.protocol.messages import Abort, AnyMessage, Delta, Prefill, Report
from serve.request import FinishReason, Request, Timeline
from serve.topology import ReplicaInfo


class Outgoing(NamedTuple):
    """A message and the rank that it is for."""

    rank: int
    message: AnyMessage


class TooManyWaiting(Exception):
    """More requests would wait for their first token than ``max_waiting`` allows."""


@dataclass(eq=False, slots=True)
class ActiveRequest:
    """One request that is not closed."""

    request: Request
    choice: Choice
    timeline: Timeline
    num_tokens: int = 0  # given out so far
    held: dict[int, Delta] = field(default_factory=dict)  # by first index: came too early


class Dispatcher:
    """Synchronous and without I/O; used on the event loop of rank 0."""

    def __init__(
        self,
        replicas: Sequence[ReplicaInfo],
        policy: str,
        max_waiting: int,
        clock: Callable[[], float],
    ) -> None:
        self._states = [ReplicaState(info) for info in replicas]
        self._policy = POLICIES[policy]
        self.max_waiting = max_waiting
        self._clock = clock
        self._active: dict[str, ActiveRequest] = {}
        self._num_dispatched = 0
        self.num_waiting = 0  # live requests without a first token

    @property
    def num_active(self) -> int:
        """Requests that are not closed."""
        return len(self._active)

    @property
    def states(self) -> Sequence[ReplicaState]:
        """The replicas in order of their ids."""
        return self._states

    def cluster(self) -> list[dict[str, Any]]:
        """The replicas of ``GET /cluster``."""
        return [state.describe() for state in self._states]

    def dispatch(self, requests: Sequence[Request]) -> list[Outgoing]:
        """Dispatch all of ``requests`` or, raising ``TooManyWaiting``, none."""
        if self.num_waiting + len(requests) > self.max_waiting:
            raise TooManyWaiting(
                f"{self.num_waiting} requests wait for their first token, {self.max_waiting} may"
            )
        return [self._dispatch_one(request) for request in requests]

    def close(self, request_id: str) -> list[Outgoing]:
        """Close a request and tell its replicas; nothing if it is closed already."""
        active = self._active.get(request_id)
        if active is None:
            return []
        self._close(active)
        leaders = {self._states[replica].info.leader for replica in active.choice}
        return [Outgoing(leader, Abort(request_id)) for leader in sorted(leaders)]

    def on_report(
        self, report: Report, offset_s: float = 0.0
    ) -> tuple[list[Output], list[Outgoing]]:
        """What a replica's report brings the clients, and whom to tell what.

        ``offset_s`` converts the replica's clock into rank 0's.
        """
        state = self._states[report.replica_id]
        state.load = report.load
        outputs: list[Output] = []
        unknown: set[str] = set()
        for delta in report.deltas:
            active = self._active.get(delta.request_id)
            if active is None:
                unknown.add(delta.request_id)
                continue
            if delta.timeline is not None:
                active.timeline.merge(delta.timeline, offset_s)
            active.held[delta.first_index] = delta
            outputs += self._release(active)
        return outputs, [Outgoing(state.info.leader, Abort(r)) for r in sorted(unknown)]

    def fail_all(self, reason: str) -> list[Output]:
        """Close every request with an error; nobody is told, for the job is ending."""
        outputs = []
        for active in list(self._active.values()):
            self._close(active)
            outputs.append(
                Output(
                    request_id=active.request.id,
                    first_index=active.num_tokens,
                    token_ids=(),
                    text="",
                    finish_reason=FinishReason.ERROR,
                    timeline=active.timeline,
                    error=reason,
                )
            )
        return outputs

    def _dispatch_one(self, request: Request) -> Outgoing:
        choice = self._policy(PolicyInput(request, self._states, self._num_dispatched))
        self._num_dispatched += 1
        active = ActiveRequest(request, choice, Timeline(arrived_s=self._clock()))
        self._active[request.id] = active
        self.num_waiting += 1
        prefill, decode = self._states[choice.prefill], self._states[choice.decode]
        prefill.num_prefill_tokens += len(request.prompt_ids)
        decode.num_decode_tokens += len(request.prompt_ids)
        for state in self._involved(active):
            state.num_requests += 1
        return Outgoing(prefill.info.leader, Prefill(request, choice.decode))

    def _involved(self, active: ActiveRequest) -> list[ReplicaState]:
        return [self._states[replica] for replica in set(active.choice)]

    def _release(self, active: ActiveRequest) -> list[Output]:
        """The outputs whose turn it is."""
        outputs = []
        while (delta := active.held.pop(active.num_tokens, None)) is not None:
            outputs.append(self._give_out(active, delta))
            if delta.finish_reason is not None:
                break
        return outputs

    def _give_out(self, active: ActiveRequest, delta: Delta) -> Output:
        if active.num_tokens == 0 and delta.token_ids:
            self._on_first_token(active)
        active.num_tokens += len(delta.token_ids)
        self._states[active.choice.decode].num_decode_tokens += len(delta.token_ids)
        if delta.finish_reason is not None:
            active.timeline.finished_s = self._clock()
            self._close(active)
        return Output(
            request_id=delta.request_id,
            first_index=delta.first_index,
            token_ids=delta.token_ids,
            text=delta.text,
            finish_reason=delta.finish_reason,
            stop_reason=delta.stop_reason,
            timeline=active.timeline if delta.finish_reason is not None else None,
        )

    def _on_first_token(self, active: ActiveRequest) -> None:
        self.num_waiting -= 1
        prompt_length = len(active.request.prompt_ids)
        self._states[active.choice.prefill].num_prefill_tokens -= prompt_length

    def _close(self, active: ActiveRequest) -> None:
        del self._active[active.request.id]
        if active.num_tokens == 0:
            self._on_first_token(active)
        context = len(active.request.prompt_ids) + active.num_tokens
        self._states[active.choice.decode].num_decode_tokens -= context
        for state in self._involved(active):
            state.num_requests -= 1
