"""Dispatcher: the requests of the cluster on rank 0, where each runs and what it has answered.

A request, as rank 0 sees it::

    dispatch() -> waiting --token 0--> streaming --last token--> closed
                    |                     |
                    +----- close() -------+-------------------> closed: Abort to its replicas

Token 0 comes from the prefill replica and the others from the decode replica, so later tokens may
arrive first; they are kept until token 0 is there. Tokens of a closed request are answered with
another Abort, because the first Abort may have arrived before the request itself.

The methods are synchronous and return the messages to send.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from serve.dispatch.admission import Admission, QueueLimits
from serve.dispatch.choices import group_choices
from serve.dispatch.output import Output
from serve.dispatch.policies import POLICIES, Placement
from serve.dispatch.replica_state import ReplicaState
from serve.protocol.messages import Abort, AnyMessage, Delta, Prefill, Report
from serve.request import FinishReason, Request, Timeline
from serve.topology import ReplicaInfo


class Outgoing(NamedTuple):
    """A message and the rank to send it to."""

    rank: int
    message: AnyMessage


@dataclass(eq=False, slots=True)
class ActiveRequest:
    """One request that is not closed."""

    request: Request
    placement: Placement
    timeline: Timeline
    client: str
    num_tokens: int = 0  # passed on to the client so far
    early: dict[int, Delta] = field(default_factory=dict)  # arrived before their turn, by index


class Dispatcher:
    """Places requests and puts their tokens in order. Used on the event loop of rank 0."""

    def __init__(
        self,
        replicas: Sequence[ReplicaInfo],
        policy: str,
        limits: QueueLimits,
        clock: Callable[[], float],
    ) -> None:
        self._states = [ReplicaState(info) for info in replicas]
        self._policy = POLICIES[policy]()
        self._admission = Admission(limits)
        self._clock = clock
        self._active: dict[str, ActiveRequest] = {}

    @property
    def limits(self) -> QueueLimits:
        """How many active requests may lack a first token."""
        return self._admission.limits

    @property
    def num_waiting(self) -> int:
        """Active requests without a first token."""
        return self._admission.num_requests

    @property
    def num_active(self) -> int:
        """Requests that are not closed."""
        return len(self._active)

    @property
    def states(self) -> Sequence[ReplicaState]:
        """The replicas in order of their ids."""
        return self._states

    def cluster(self) -> list[dict[str, Any]]:
        """Return the replicas as ``GET /cluster`` shows them."""
        return [state.describe() for state in self._states]

    def dispatch(self, requests: Sequence[Request], client: str = "") -> list[Outgoing]:
        """Dispatch all of ``requests`` or, raising ``TooManyWaiting``, none.

        Each prompt travels once to each replica that prefills it, for any number of choices.
        """
        self._admission.check(requests, client)
        outgoing: list[Outgoing] = []
        for choices in group_choices(requests):
            placed: dict[int, list[tuple[Request, int]]] = {}  # by prefill replica
            for request in choices:
                placement = self._place(request, client)
                placed.setdefault(placement.prefill, []).append((request, placement.decode))
            for replica, requests_there in placed.items():
                leader = self._states[replica].info.leader
                outgoing.append(Outgoing(leader, Prefill.of(*requests_there)))
        return outgoing

    def close(self, request_id: str) -> list[Outgoing]:
        """Close a request and abort it on its replicas. Return nothing if it is closed already."""
        active = self._active.get(request_id)
        if active is None:
            return []
        self._close(active)
        leaders = {self._states[replica].info.leader for replica in active.placement}
        return [Outgoing(leader, Abort(request_id)) for leader in sorted(leaders)]

    def on_report(
        self, report: Report, offset_s: float = 0.0
    ) -> tuple[list[Output], list[Outgoing]]:
        """Take in a replica's report. Return the outputs for clients and the messages to send.

        ``offset_s`` is added to the replica's time stamps to convert them to rank 0's clock.
        """
        state = self._states[report.replica_id]
        state.load = report.load
        self._policy.on_report(report)
        outputs: list[Output] = []
        unknown: set[str] = set()  # one Abort for each request, however many tokens arrived
        for delta in report.deltas:
            active = self._active.get(delta.request_id)
            if active is None:
                unknown.add(delta.request_id)
                continue
            if delta.timeline is not None:
                active.timeline.merge(delta.timeline, offset_s)
            active.early[delta.first_index] = delta
            outputs += self._pass_on_in_order(active)
        return outputs, [Outgoing(state.info.leader, Abort(r)) for r in sorted(unknown)]

    def fail_all(self, reason: str) -> list[Output]:
        """Close every request with an error. The replicas get no Abort: the job is ending."""
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

    def _place(self, request: Request, client: str) -> Placement:
        placement = self._policy.choose(request, self._states)
        active = ActiveRequest(request, placement, Timeline(arrived_s=self._clock()), client)
        self._active[request.id] = active
        self._admission.add(request, client)
        prefill, decode = self._states[placement.prefill], self._states[placement.decode]
        prefill.num_prefill_tokens += request.num_prompt_tokens
        decode.num_decode_tokens += request.num_prompt_tokens
        for state in self._states_of(active):
            state.num_requests += 1
        return placement

    def _states_of(self, active: ActiveRequest) -> list[ReplicaState]:
        return [self._states[replica] for replica in set(active.placement)]

    def _pass_on_in_order(self, active: ActiveRequest) -> list[Output]:
        """Return outputs up to the first missing token."""
        outputs = []
        while (delta := active.early.pop(active.num_tokens, None)) is not None:
            outputs.append(self._pass_on(active, delta))
            if delta.finish_reason is not None:
                break
        return outputs

    def _pass_on(self, active: ActiveRequest, delta: Delta) -> Output:
        if active.num_tokens == 0 and delta.token_ids:
            self._on_first_token(active)
        active.num_tokens += len(delta.token_ids)
        self._states[active.placement.decode].num_decode_tokens += len(delta.token_ids)
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
            error=delta.error,
        )

    def _on_first_token(self, active: ActiveRequest) -> None:
        self._admission.remove(active.request, active.client)
        prompt_length = active.request.num_prompt_tokens
        self._states[active.placement.prefill].num_prefill_tokens -= prompt_length

    def _close(self, active: ActiveRequest) -> None:
        del self._active[active.request.id]
        if active.num_tokens == 0:
            self._on_first_token(active)
        context = active.request.num_prompt_tokens + active.num_tokens
        self._states[active.placement.decode].num_decode_tokens -= context
        for state in self._states_of(active):
            state.num_requests -= 1
        self._policy.on_finished(active.request, active.placement)
