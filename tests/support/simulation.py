"""A cluster in one thread: real replicas, fake GPUs, and events in random order.

The only order kept is that of the messages between one pair of ranks.
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable, Iterable
from functools import partial

from serve.protocol.messages import NUM_STAGING_SLOTS, Abort, AnyMessage, Delta, Prefill, Report
from serve.replica.limits import SchedulerLimits
from serve.replica.replica import Actions, Replica, ReplicaSettings
from serve.request import FinishReason, Request, SamplingParams, pack_ids
from tests.support.fake_gpu import EOS, VOCAB_SIZE, FakeModel, FakeReplica, Wires


class Cluster:
    """Replicas, the channels between them, and rank 0's record of the answers."""

    def __init__(
        self,
        rng: random.Random,
        num_prefill: int,
        num_decode: int,
        *,
        num_blocks: int = 24,
        block_size: int = 4,
        max_num_batched_tokens: int = 24,
        max_num_seqs: int = 8,
        max_push_blocks: int = 2,
        chunked: bool = True,
        window: int | None = None,
    ) -> None:
        self.rng = rng
        self.num_prefill = num_prefill
        self.clock = 0.0
        count = max(num_prefill + num_decode, 1)
        limits = SchedulerLimits(max_num_seqs, max_num_batched_tokens, chunked, block_size, window)
        leaders = tuple(range(1, count + 1))  # rank 0 only dispatches
        self.model = FakeModel(window)
        num_unused = 0 if window is None else 1  # block 0, see FakeReplica
        self.nodes = [
            FakeReplica(
                Replica(
                    ReplicaSettings(
                        i, leaders, num_blocks + num_unused, limits, max_push_blocks, (EOS,)
                    ),
                    None,
                    self._now,
                ),
                num_blocks,
                block_size,
                self.model,
            )
            for i in range(count)
        ]
        self.channels: dict[tuple[int, int], deque[AnyMessage]] = {}
        self.wires = Wires()
        self.unreported: list[tuple[int, int, int]] = []  # received, but not reported to the leader
        self.answers: dict[str, dict[int, int]] = {}
        self.endings: dict[str, list[FinishReason]] = {}
        self.places: dict[str, tuple[int, int]] = {}
        self.loads: dict[int, Report] = {}
        self.max_preemptions = 0

    def _now(self) -> float:
        self.clock += 1.0
        return self.clock

    # --- rank 0 ---------------------------------------------------------------------

    def submit(self, request: Request) -> None:
        count = len(self.nodes)
        prefill = self.rng.randrange(self.num_prefill or count)
        decode = self.rng.randrange(self.num_prefill, count) if self.num_prefill else prefill
        self.places[request.id] = (prefill, decode)
        self.answers[request.id] = {}
        self.endings[request.id] = []
        self._post(0, prefill + 1, Prefill.of((request, decode)))

    def abort(self, request_id: str) -> None:
        if self.endings[request_id]:
            return
        self.endings[request_id].append(FinishReason.ABORT)
        for place in set(self.places[request_id]):
            self._post(0, place + 1, Abort(request_id))

    def _on_report(self, report: Report) -> None:
        self.loads[report.replica_id] = report
        self.max_preemptions = max(self.max_preemptions, report.load.num_preemptions)
        for delta in report.deltas:
            self._on_delta(report.replica_id, delta)

    def _on_delta(self, replica_id: int, delta: Delta) -> None:
        endings = self.endings[delta.request_id]
        # Token 0 comes from the prefill replica, so it may arrive after the end.
        is_late_start = delta.first_index == 0 and FinishReason.ABORT not in endings
        if endings and not is_late_start:
            self._post(0, replica_id + 1, Abort(delta.request_id))
            return
        for offset, token in enumerate(delta.token_ids):
            index = delta.first_index + offset
            assert index not in self.answers[delta.request_id], "a token arrived twice"
            self.answers[delta.request_id][index] = token
        if delta.finish_reason is not None:
            endings.append(delta.finish_reason)

    # --- events ---------------------------------------------------------------------------------

    def run(self, on_event: Callable[[], None] = lambda: None) -> None:
        """Run random enabled events until none is left."""
        while events := self._enabled():
            self.rng.choice(events)()
            on_event()

    def _enabled(self) -> list[Callable[[], None]]:
        events: list[Callable[[], None]] = []
        for pair, queue in self.channels.items():
            if queue:
                events.append(partial(self._deliver, pair))
        for i, node in enumerate(self.nodes):
            if node.plan:
                events.append(partial(self._execute, i))
            if node.sends:
                events.append(partial(node.pack, self.wires, i))
            if node.results:
                events.append(partial(self._finish_step, i))
        for key in self.wires.posted:
            if key in self.wires.sent:
                events.append(partial(self._receive, key))
        for key in self.unreported:
            events.append(partial(self._report_received, key))
        return events

    def _deliver(self, pair: tuple[int, int]) -> None:
        message = self.channels[pair].popleft()
        if pair[1] == 0:
            assert isinstance(message, Report)
            self._on_report(message)
        else:
            self._apply(pair[1] - 1, self.nodes[pair[1] - 1].replica.on_message(message))

    def _execute(self, i: int) -> None:
        self.nodes[i].execute(self.nodes[i].plan.popleft(), self.wires, i)

    def _finish_step(self, i: int) -> None:
        self._apply(i, self.nodes[i].replica.on_step(self.nodes[i].results.popleft()))

    def _receive(self, key: tuple[int, int, int]) -> None:
        """Complete a transfer; on one link the oldest first, as on a stream."""
        prefill, decode, _ = key
        number = min(k[2] for k in self.wires.posted if k[:2] == (prefill, decode))
        key = (prefill, decode, number)
        blocks = self.wires.sent.pop(key)
        assert len(blocks) == self.wires.posted.pop(key), "send and receive differ in size"
        slot = (prefill, number % NUM_STAGING_SLOTS)
        assert slot not in self.nodes[decode].staging, "a staging slot is overwritten"
        self.nodes[decode].staging[slot] = blocks
        self.unreported.append(key)

    def _report_received(self, key: tuple[int, int, int]) -> None:
        """Report a received push to the leader, in any order: several ranks and threads report."""
        self.unreported.remove(key)
        prefill, decode, number = key
        self._apply(decode, self.nodes[decode].replica.on_received(prefill, number))

    def _apply(self, i: int, actions: Actions) -> None:
        replica = self.nodes[i].replica
        self._issue(i, actions)
        while (step := replica.next_step()) is not None:
            self.nodes[i].add(step)
        self._issue(i, replica.idle_report())

    def _issue(self, i: int, actions: Actions) -> None:
        for entry in actions.entries:
            self.nodes[i].add(entry)
        for rank, message in actions.messages:
            self._post(i + 1, rank, message)

    def _post(self, source: int, target: int, message: AnyMessage) -> None:
        self.channels.setdefault((source, target), deque()).append(message)

    # --- checks at the end ----------------------------------------------------------------

    def check(self, requests: Iterable[Request]) -> None:
        for request in requests:
            endings = self.endings[request.id]
            assert len(endings) == 1, f"{request.id} was answered {len(endings)} times"
            answer = self.answers[request.id]
            expected = self.model.expected_output(request)
            got = [answer[index] for index in sorted(answer)]
            assert sorted(answer) == list(range(len(answer))) or endings == [FinishReason.ABORT]
            for index, token in answer.items():
                assert token == expected[index], f"{request.id}: token {index} is wrong"
            if endings != [FinishReason.ABORT]:
                assert got == expected
        for i, node in enumerate(self.nodes):
            load = self.nodes[i].replica.heartbeat().messages[-1][1].load  # type: ignore[union-attr]
            assert load.num_free_blocks == node.num_blocks, f"replica {i} leaks: {load}"
            assert load.num_running == load.num_waiting == 0
            assert load.num_receiving == load.num_sending == 0


def random_request(rng: random.Random, number: int, max_total: int) -> Request:
    """Make a request whose prompt and output together fit into ``max_total`` tokens."""
    length = rng.randint(1, max_total - 1)
    return Request(
        id=f"r{number}",
        prompt=pack_ids(rng.randrange(VOCAB_SIZE) for _ in range(length)),
        sampling=SamplingParams(
            max_tokens=rng.randint(1, max_total - length),
            ignore_eos=rng.random() < 0.5,
            repetition_penalty=rng.choice(
                (1.0, 1.3)
            ),  # FakeReplica checks the tokens it depends on
        ),
    )


def storm(seed: int, shape: tuple[int, int], *, abort_rate: float, **options: object) -> Cluster:
    """Run sixty requests and aborts at random moments, and check the answers at the end."""
    print(f"seed={seed} shape={shape} abort_rate={abort_rate} {options}")
    rng = random.Random(seed)
    cluster = Cluster(rng, *shape, **options)  # type: ignore[arg-type]
    requests: list[Request] = []

    def disturb() -> None:
        if len(requests) < 60 and rng.random() < 0.05:
            requests.append(random_request(rng, len(requests), max_total=60))
            cluster.submit(requests[-1])
        if requests and rng.random() < abort_rate:
            cluster.abort(rng.choice(requests).id)

    requests.append(random_request(rng, 0, max_total=60))
    cluster.submit(requests[0])
    while len(requests) < 60:
        cluster.run(disturb)
        requests.append(random_request(rng, len(requests), max_total=60))
        cluster.submit(requests[-1])
    cluster.run(disturb)
    cluster.check(requests)
    return cluster
