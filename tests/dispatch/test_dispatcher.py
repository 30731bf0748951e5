"""The dispatcher, message by message: messages to replicas, counts, outputs to clients."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest

from serve.dispatch.admission import QueueLimits, TooManyWaiting
from serve.dispatch.dispatcher import Dispatcher, Outgoing
from serve.dispatch.policies import POLICIES, DispatchPolicy, Placement
from serve.dispatch.replica_state import ReplicaState
from serve.protocol.messages import Abort, Delta, Prefill, ReplicaLoad, Report
from serve.request import FinishReason, Request, SamplingParams, Timeline, pack_ids
from serve.topology import ReplicaInfo, Role

# Leaders are ranks 0 and 2.
DISAGGREGATED = (
    ReplicaInfo(0, Role.PREFILL, (0, 1), 2, 1),
    ReplicaInfo(1, Role.DECODE, (2,), 1, 1),
)
COLOCATED = (ReplicaInfo(0, Role.MIXED, (0,), 1, 1),)
PREFILL, DECODE = 0, 1
PREFILL_LEADER, DECODE_LEADER = 0, 2


class Clock:
    """A clock that stands still until a test sets it."""

    def __init__(self) -> None:
        self.now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


def make_request(id: str = "a", prompt: int = 5) -> Request:
    sampling = SamplingParams(max_tokens=8)
    return Request(id=id, prompt=pack_ids(range(prompt)), sampling=sampling)


def make_dispatcher(
    replicas: tuple[ReplicaInfo, ...] = DISAGGREGATED,
    max_waiting: int = 8,
    clock: Clock | None = None,
) -> Dispatcher:
    policy = "least-num-unfinished-tokens"
    return Dispatcher(replicas, policy, QueueLimits(max_waiting, 1 << 20), clock or Clock())


def report(replica_id: int, *deltas: Delta, **load: int) -> Report:
    return Report(replica_id, ReplicaLoad(**load), deltas)


def delta(index: int, id: str = "a", **more: Any) -> Delta:
    return Delta(
        request_id=id, first_index=index, token_ids=(10 + index,), text=f"<{index}>", **more
    )


def counts(dispatcher: Dispatcher) -> list[tuple[int, int, int]]:
    """Return the prefill tokens, decode tokens and requests of each replica."""
    return [
        (state.num_prefill_tokens, state.num_decode_tokens, state.num_requests)
        for state in dispatcher.states
    ]


def test_a_request_goes_to_the_prefill_leader_and_names_its_decode_replica() -> None:
    dispatcher = make_dispatcher()
    request = make_request()
    assert dispatcher.dispatch([request]) == [
        Outgoing(PREFILL_LEADER, Prefill.of((request, DECODE)))
    ]
    assert (dispatcher.num_active, dispatcher.num_waiting) == (1, 1)


def test_a_colocated_request_stays_with_one_replica() -> None:
    dispatcher = make_dispatcher(COLOCATED)
    request = make_request()
    assert dispatcher.dispatch([request]) == [Outgoing(0, Prefill.of((request, 0)))]
    assert counts(dispatcher) == [(5, 5, 1)]
    assert dispatcher.close("a") == [Outgoing(0, Abort("a"))]
    assert counts(dispatcher) == [(0, 0, 0)]


class RecordingPolicy(DispatchPolicy):
    """Places every request on replicas 0 and 1 and records the dispatcher's calls."""

    summary = "for tests"

    def __init__(self) -> None:
        self.calls: list[tuple[str, object]] = []

    def choose(self, request: Request, replicas: Sequence[ReplicaState]) -> Placement:
        self.calls.append(("choose", request.id))
        return Placement(PREFILL, DECODE)

    def on_report(self, report: Report) -> None:
        self.calls.append(("report", report.replica_id))

    def on_finished(self, request: Request, placement: Placement) -> None:
        self.calls.append(("finished", (request.id, placement)))


def test_a_registered_policy_chooses_and_gets_reports_and_ends(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    policy = RecordingPolicy()
    monkeypatch.setitem(POLICIES, "recording", lambda: policy)
    dispatcher = Dispatcher(DISAGGREGATED, "recording", QueueLimits(8, 1 << 20), Clock())
    dispatcher.dispatch([make_request("a"), make_request("b"), make_request("c")])
    dispatcher.on_report(report(PREFILL, delta(0, finish_reason=FinishReason.STOP)))
    dispatcher.close("b")
    dispatcher.close("b")
    dispatcher.on_report(report(DECODE))
    dispatcher.fail_all("lost")
    place = Placement(PREFILL, DECODE)
    assert policy.calls == [
        ("choose", "a"),
        ("choose", "b"),
        ("choose", "c"),
        ("report", PREFILL),
        ("finished", ("a", place)),
        ("finished", ("b", place)),
        ("report", DECODE),
        ("finished", ("c", place)),
    ]


def test_counts_from_dispatch_to_the_end() -> None:
    dispatcher = make_dispatcher()
    dispatcher.dispatch([make_request()])
    assert counts(dispatcher) == [(5, 0, 1), (0, 5, 1)]  # before any report
    dispatcher.on_report(report(PREFILL, delta(0)))
    assert counts(dispatcher) == [(0, 0, 1), (0, 6, 1)]
    assert (dispatcher.num_active, dispatcher.num_waiting) == (1, 0)
    dispatcher.on_report(report(DECODE, delta(1), delta(2)))
    assert counts(dispatcher) == [(0, 0, 1), (0, 8, 1)]
    dispatcher.on_report(report(DECODE, delta(3, finish_reason=FinishReason.LENGTH)))
    assert counts(dispatcher) == [(0, 0, 0), (0, 0, 0)]
    assert (dispatcher.num_active, dispatcher.num_waiting) == (0, 0)


def test_too_many_are_refused_all_or_none() -> None:
    dispatcher = make_dispatcher(max_waiting=3)
    dispatcher.dispatch([make_request("a"), make_request("b")])
    before = counts(dispatcher)
    with pytest.raises(TooManyWaiting, match="2 requests wait"):
        dispatcher.dispatch([make_request("c"), make_request("d")])
    assert (dispatcher.num_active, dispatcher.num_waiting) == (2, 2)
    assert counts(dispatcher) == before
    dispatcher.on_report(report(PREFILL, delta(0)))  # one request fewer waits, none has ended
    dispatcher.dispatch([make_request("c"), make_request("d")])
    assert (dispatcher.num_active, dispatcher.num_waiting) == (4, 3)


def test_an_abort_closes_a_request_and_goes_to_both_replicas_once() -> None:
    dispatcher = make_dispatcher()
    dispatcher.dispatch([make_request()])
    aborts = dispatcher.close("a")
    assert aborts == [Outgoing(PREFILL_LEADER, Abort("a")), Outgoing(DECODE_LEADER, Abort("a"))]
    assert dispatcher.close("a") == dispatcher.close("never seen") == []
    assert counts(dispatcher) == [(0, 0, 0), (0, 0, 0)]
    assert (dispatcher.num_active, dispatcher.num_waiting) == (0, 0)


@pytest.mark.parametrize("finished", [False, True])
def test_tokens_of_a_closed_request_are_answered_with_another_abort(finished: bool) -> None:
    dispatcher = make_dispatcher()
    dispatcher.dispatch([make_request("a"), make_request("b")])
    if finished:
        dispatcher.on_report(report(PREFILL, delta(0, finish_reason=FinishReason.STOP)))
    else:
        dispatcher.close("a")
    late = report(DECODE, delta(1), delta(2), delta(1, id="unknown"))
    outputs, outgoing = dispatcher.on_report(late)
    assert outputs == []
    assert outgoing == [
        Outgoing(DECODE_LEADER, Abort("a")),  # once for two deltas
        Outgoing(DECODE_LEADER, Abort("unknown")),
    ]
    assert dispatcher.on_report(late)[1] == outgoing  # the replica has not received the abort yet
    assert dispatcher.num_active == 1


def test_decode_tokens_wait_for_token_0() -> None:
    dispatcher = make_dispatcher()
    dispatcher.dispatch([make_request()])
    assert dispatcher.on_report(report(DECODE, delta(1))) == ([], [])
    end = delta(2, finish_reason=FinishReason.STOP, stop_reason="x")
    assert dispatcher.on_report(report(DECODE, end)) == ([], [])
    assert (dispatcher.num_active, dispatcher.num_waiting) == (1, 1)
    outputs, outgoing = dispatcher.on_report(report(PREFILL, delta(0)))
    assert [(o.first_index, o.token_ids, o.text) for o in outputs] == [
        (0, (10,), "<0>"),
        (1, (11,), "<1>"),
        (2, (12,), "<2>"),
    ]
    assert [o.finish_reason for o in outputs] == [None, None, FinishReason.STOP]
    assert [o.timeline is not None for o in outputs] == [False, False, True]
    assert outputs[-1].stop_reason == "x"
    assert outgoing == []
    assert (dispatcher.num_active, dispatcher.num_waiting) == (0, 0)


def test_stamps_of_both_replicas_are_converted_to_one_clock() -> None:
    clock = Clock()
    dispatcher = make_dispatcher(clock=clock)
    dispatcher.dispatch([make_request()])
    decode = Timeline(transfer_started_s=903.0, transfer_ended_s=904.0, decode_started_s=905.0)
    dispatcher.on_report(report(DECODE, delta(1, timeline=decode)), offset_s=-800.0)
    prefill = Timeline(prefill_queued_s=1.0, prefill_started_s=1.5, prefill_ended_s=2.0)
    dispatcher.on_report(report(PREFILL, delta(0, timeline=prefill)), offset_s=100.0)
    clock.now_s = 110.0
    outputs, _ = dispatcher.on_report(report(DECODE, delta(2, finish_reason=FinishReason.LENGTH)))
    assert outputs[-1].timeline == Timeline(
        arrived_s=100.0,
        prefill_queued_s=101.0,
        prefill_started_s=101.5,
        prefill_ended_s=102.0,
        transfer_started_s=103.0,
        transfer_ended_s=104.0,
        decode_started_s=105.0,
        finished_s=110.0,
    )


def test_when_the_job_fails_every_request_ends_with_the_reason() -> None:
    dispatcher = make_dispatcher()
    dispatcher.dispatch([make_request("a"), make_request("b")])
    dispatcher.on_report(report(PREFILL, delta(0)))
    outputs = dispatcher.fail_all("rank 3 is lost")
    assert [(o.request_id, o.first_index, o.token_ids) for o in outputs] == [
        ("a", 1, ()),
        ("b", 0, ()),
    ]
    assert {(o.finish_reason, o.error) for o in outputs} == {(FinishReason.ERROR, "rank 3 is lost")}
    assert counts(dispatcher) == [(0, 0, 0), (0, 0, 0)]
    assert (dispatcher.num_active, dispatcher.num_waiting) == (0, 0)
    assert dispatcher.fail_all("again") == []


def test_the_cluster_shows_what_was_last_reported() -> None:
    dispatcher = make_dispatcher()
    dispatcher.on_report(report(DECODE, num_blocks=9, num_free_blocks=4, num_waiting=7))
    load = {"num_blocks": 9, "num_free_blocks": 5, "num_waiting": 1, "num_running": 2}
    transfers = {"num_receiving": 3, "num_sending": 4}
    dispatcher.on_report(report(DECODE, **load, **transfers))
    place = {"id": 1, "role": "decode", "ranks": [2], "tp": 1, "pp": 1}
    nothing = dict.fromkeys(load | transfers, 0)
    first = {"id": 0, "role": "prefill", "ranks": [0, 1], "tp": 2, "pp": 1}
    assert dispatcher.cluster() == [first | nothing, place | load | transfers]
