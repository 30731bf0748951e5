"""The dispatcher under random orders of reports, aborts and handovers."""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial

import pytest

from serve.dispatch.admission import QueueLimits, TooManyWaiting
from serve.dispatch.dispatcher import Dispatcher, Outgoing
from serve.dispatch.output import Output
from serve.dispatch.policies import POLICIES
from serve.protocol.messages import Abort, Delta, Prefill, ReplicaLoad, Report
from serve.request import FinishReason, Request, SamplingParams, Timeline, pack_ids
from serve.topology import ReplicaInfo, Role

ROLES = {"P": Role.PREFILL, "D": Role.DECODE, "M": Role.MIXED}
NUM_REQUESTS = 40
MAX_WAITING = 12
CLOCK_SKEW_S = 1000.0  # replica i's clock is i times this ahead of rank 0's


@dataclass
class Job:
    """A request on a replica that makes its tokens."""

    request: Request
    decode_replica: int
    next_index: int = 0
    timeline_reported: bool = False


@dataclass
class Peer:
    """One replica, which makes tokens, receives aborts late and hands over to other peers."""

    id: int
    inbox: deque[Prefill | Abort] = field(default_factory=deque)
    handed: deque[Job] = field(default_factory=deque)  # from prefill peers, on their own links
    outbox: deque[Report] = field(default_factory=deque)
    jobs: dict[str, Job] = field(default_factory=dict)


class Cluster:
    """Peers around a real dispatcher. Only messages on the same channel keep their order."""

    def __init__(self, shape: str, policy: str, seed: int) -> None:
        infos = [ReplicaInfo(i, ROLES[role], (i,), 1, 1) for i, role in enumerate(shape)]
        self.rng = random.Random(seed)
        self.now_s = 0.0
        self.dispatcher = Dispatcher(infos, policy, QueueLimits(MAX_WAITING, 1 << 20), self.clock)
        self.peers = [Peer(info.id) for info in infos]
        self.requests: dict[str, Request] = {}
        self.outputs: dict[str, list[Output]] = {}
        self.aborted: set[str] = set()
        self.num_refused = 0
        self.num_repeated = 0  # aborts that answered tokens of a closed request
        self.num_early = 0

    def clock(self) -> float:
        self.now_s += 0.125  # exact in binary, so stamps convert without rounding
        return self.now_s

    # --- events ------------------------------------------------------------------

    def submit(self) -> None:
        """Submit a call for up to three choices."""
        group = [
            Request(
                id=f"r{len(self.requests) + i}",
                prompt=pack_ids(range(self.rng.randint(1, 20))),
                sampling=SamplingParams(max_tokens=self.rng.choice([1, 1, 2, 3, 8])),
            )
            for i in range(self.rng.randint(1, 3))
        ]
        before = (self.dispatcher.num_active, self.dispatcher.num_waiting)
        try:
            outgoing = self.dispatcher.dispatch(group)
        except TooManyWaiting:
            self.num_refused += 1
            assert before[1] + len(group) > MAX_WAITING
            assert (self.dispatcher.num_active, self.dispatcher.num_waiting) == before
            return
        assert before[1] + len(group) <= MAX_WAITING
        self.requests |= {request.id: request for request in group}
        self.outputs |= {request.id: [] for request in group}
        self._send(outgoing)

    def abort(self) -> None:
        """Disconnect a client, which may have its answer already."""
        request_id = self.rng.choice(list(self.requests))
        outgoing = self.dispatcher.close(request_id)
        if outgoing:
            self.aborted.add(request_id)
        self._send(outgoing)

    def receive(self, peer: Peer) -> None:
        message = peer.inbox.popleft()
        if isinstance(message, Abort):
            peer.jobs.pop(message.request_id, None)
        else:
            for request, decode_replica in message.requests:
                peer.jobs[request.id] = Job(request, decode_replica)

    def take_over(self, peer: Peer) -> None:
        job = peer.handed.popleft()
        peer.jobs[job.request.id] = Job(job.request, peer.id, next_index=1)

    def step(self, peer: Peer) -> None:
        """Make a token for some of the peer's requests, in one report."""
        jobs = [job for job in peer.jobs.values() if self.rng.random() < 0.7]
        load = ReplicaLoad(num_running=len(peer.jobs))
        peer.outbox.append(Report(peer.id, load, tuple(self._token(peer, job) for job in jobs)))

    def deliver(self, peer: Peer) -> None:
        report = peer.outbox.popleft()
        outputs, outgoing = self.dispatcher.on_report(report, -CLOCK_SKEW_S * peer.id)
        self.num_early += len(report.deltas) > len(outputs) + len(outgoing)
        for output in outputs:
            assert output.request_id not in self.aborted
            self.outputs[output.request_id].append(output)
        assert all(out.rank == peer.id and isinstance(out.message, Abort) for out in outgoing)
        ids = [out.message.request_id for out in outgoing if isinstance(out.message, Abort)]
        assert len(set(ids)) == len(ids)
        self.num_repeated += len(ids)
        self._send(outgoing)

    # --- a random order of events --------------------------------------------------------------

    def run(self) -> None:
        """Run random events until every request is submitted and no event is left."""
        while choices := self._choices():
            self.rng.choice(choices)()
            self._check_counts()

    def _choices(self) -> list[Callable[[], None]]:
        choices: list[Callable[[], None]] = []
        for peer in self.peers:
            choices += [partial(self.receive, peer)] if peer.inbox else []
            choices += [partial(self.take_over, peer)] if peer.handed else []
            choices += [partial(self.step, peer)] if peer.jobs else []
            choices += [partial(self.deliver, peer)] if peer.outbox else []
        if len(self.requests) < NUM_REQUESTS:
            choices.append(self.submit)
        if self.requests and choices and self.rng.random() < 0.3:
            choices.append(self.abort)
        return choices

    def _send(self, outgoing: Sequence[Outgoing]) -> None:
        for rank, message in outgoing:
            assert isinstance(message, Prefill | Abort)
            self.peers[rank].inbox.append(message)

    def _token(self, peer: Peer, job: Job) -> Delta:
        index, job.next_index = job.next_index, job.next_index + 1
        first, job.timeline_reported = not job.timeline_reported, True
        last = job.next_index == job.request.sampling.max_tokens
        if last:
            del peer.jobs[job.request.id]
        elif job.decode_replica != peer.id:
            del peer.jobs[job.request.id]
            self.peers[job.decode_replica].handed.append(job)
        return Delta(
            request_id=job.request.id,
            first_index=index,
            token_ids=(index + 100,),
            text=f"<{index}>",
            finish_reason=FinishReason.LENGTH if last else None,
            timeline=self._timeline(peer, index) if first else None,
        )

    def _timeline(self, peer: Peer, index: int) -> Timeline:
        now_s = self.clock() + CLOCK_SKEW_S * peer.id
        return Timeline(prefill_ended_s=now_s) if index == 0 else Timeline(decode_started_s=now_s)

    # --- checks -----------------------------------------------------------------------

    def _check_counts(self) -> None:
        active = [r for r in self.requests if r not in self.aborted and not self._ended(r)]
        waiting = [r for r in active if not self.outputs[r]]
        assert self.dispatcher.num_active == len(active)
        assert self.dispatcher.num_waiting == len(waiting)
        prompts = {id: len(request.prompt_ids) for id, request in self.requests.items()}
        given = {id: sum(len(o.token_ids) for o in self.outputs[id]) for id in active}
        states = self.dispatcher.states
        assert sum(s.num_prefill_tokens for s in states) == sum(prompts[r] for r in waiting)
        assert sum(s.num_decode_tokens for s in states) == sum(
            prompts[r] + given[r] for r in active
        )

    def _ended(self, request_id: str) -> bool:
        outputs = self.outputs[request_id]
        return bool(outputs) and outputs[-1].finish_reason is not None


def check_answers(cluster: Cluster) -> None:
    """Check that each request has one answer, with all tokens in order and stamps on one clock."""
    for id, request in cluster.requests.items():
        outputs = cluster.outputs[id]
        tokens = [token for output in outputs for token in output.token_ids]
        assert tokens == list(range(100, 100 + len(tokens)))
        assert "".join(o.text for o in outputs) == "".join(f"<{i}>" for i in range(len(tokens)))
        assert [o.first_index for o in outputs] == list(range(len(outputs)))
        assert all(o.finish_reason is None and o.timeline is None for o in outputs[:-1])
        if id in cluster.aborted:
            assert len(tokens) < request.sampling.max_tokens
            continue
        assert len(tokens) == request.sampling.max_tokens
        timeline = outputs[-1].timeline
        assert outputs[-1].finish_reason is FinishReason.LENGTH
        assert timeline is not None
        stages = [
            timeline.arrived_s,
            timeline.prefill_ended_s,
            timeline.decode_started_s,
            timeline.finished_s,
        ]
        passed = [time_s for time_s in stages if time_s is not None]
        assert passed == sorted(passed)
        assert len(passed) >= 3


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("shape", ["PD", "PPD", "PPDDD", "M", "MMM"])
@pytest.mark.parametrize("seed", range(12))
def test_every_request_is_answered_once_in_order(shape: str, policy: str, seed: int) -> None:
    cluster = Cluster(shape, policy, seed)
    cluster.run()
    check_answers(cluster)
    # No state is left, neither in the dispatcher nor in the peers.
    assert (cluster.dispatcher.num_active, cluster.dispatcher.num_waiting) == (0, 0)
    for state in cluster.dispatcher.states:
        assert (state.num_prefill_tokens, state.num_decode_tokens, state.num_requests) == (0, 0, 0)
    assert not any(peer.jobs for peer in cluster.peers)


def test_the_random_orders_include_the_rare_cases() -> None:
    """The runs include early tokens, refused requests and aborts that arrive before a request."""
    early = refused = repeated = aborted = 0
    for seed in range(12):
        cluster = Cluster("PPDDD", "round-robin", seed)
        cluster.run()
        early += cluster.num_early
        refused += cluster.num_refused
        repeated += cluster.num_repeated
        aborted += len(cluster.aborted)
    assert min(early, refused, repeated, aborted) > 0, (early, refused, repeated, aborted)
