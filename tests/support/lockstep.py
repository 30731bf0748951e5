"""Lockstep: a prefill and a decode replica that compute one step a tick each, in a fixed order.

It shows how many steps a load takes and how many tokens are computed twice. ``simulation.py`` has
random orders and checks tokens; here every token is the same.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from serve.protocol.messages import AnyMessage, Prefill, ReplicaLoad, Report
from serve.protocol.plan import PostReceive, SampleRow, Step
from serve.replica.limits import SchedulerLimits
from serve.replica.replica import Actions, Replica, ReplicaSettings
from serve.request import Request
from serve.topology import FRONT_END_RANK

TOKEN, END = 1, 2


@dataclass
class Node:
    """One replica and the entries of its plan that are not carried out."""

    replica: Replica
    steps: deque[Step] = field(default_factory=deque)
    receives: deque[PostReceive] = field(default_factory=deque)
    load: ReplicaLoad = field(default_factory=ReplicaLoad)
    num_steps: int = 0
    num_tokens: int = 0
    num_sampled: int = 0

    @property
    def num_recomputed(self) -> int:
        """On the decode replica: tokens computed beyond the one that each sampled token costs."""
        return self.num_tokens - self.num_sampled


class Lockstep:
    """Replica 0 prefills, replica 1 decodes; a push takes one tick. Rank ``i + 1`` leads ``i``."""

    def __init__(
        self,
        num_blocks: tuple[int, int],
        *,
        block_size: int = 16,
        max_num_seqs: int = 256,
        budgets: tuple[int, int] = (8192, 2048),
        lengths: Mapping[str, int] | None = None,
        overcommit: float = 1.0,
    ) -> None:
        self._lengths = lengths or {}  # of answers that end before max_tokens, by request id
        self.num_ticks = 0
        self.finished: Counter[str] = Counter()
        self._messages: deque[tuple[int, AnyMessage]] = deque()
        self.nodes: list[Node] = []
        for i in range(2):
            limits = SchedulerLimits(
                max_num_seqs, budgets[i], True, block_size, overcommit=overcommit
            )
            settings = ReplicaSettings(i, (1, 2), num_blocks[i], limits, 64, (END,))
            self.nodes.append(Node(Replica(settings, None, lambda: float(self.num_ticks))))
        self.prefill, self.decode = self.nodes

    def submit(self, requests: Iterable[Request]) -> None:
        """Send requests to the prefill replica, to be decoded on the other."""
        self._messages.extend((1, Prefill.of((request, 1))) for request in requests)
        self._deliver()

    def tick(self) -> bool:
        """Complete the oldest step and the pushes of each replica. Return False at rest."""
        work = [(n, list(n.receives), n.steps.popleft() if n.steps else None) for n in self.nodes]
        if not any(step or receives for _, receives, step in work):
            return False
        self.num_ticks += 1
        for node, receives, step in work:
            for entry in receives:
                node.receives.remove(entry)
                self._apply(node, node.replica.on_received(entry.prefill_replica, entry.number))
            if step is not None:
                self._count(node, step)
                self._apply(node, node.replica.on_step(list(map(self._sample, step.rows))))
        self._deliver()
        return True

    def run(self) -> None:
        """Tick until nothing is left to do."""
        while self.tick():
            pass

    def _sample(self, row: SampleRow) -> int:
        return END if row.output_index + 1 == self._lengths.get(row.request.id) else TOKEN

    def _count(self, node: Node, step: Step) -> None:
        node.num_steps += 1
        node.num_tokens += sum(len(sequence.token_ids) for sequence in step.sequences)
        node.num_sampled += len(step.rows)

    def _deliver(self) -> None:
        while self._messages:
            rank, message = self._messages.popleft()
            if rank != FRONT_END_RANK:
                node = self.nodes[rank - 1]
                self._apply(node, node.replica.on_message(message))
            elif isinstance(message, Report):
                self.nodes[message.replica_id].load = message.load
                for delta in message.deltas:
                    self.finished[delta.request_id] += delta.finish_reason is not None

    def _apply(self, node: Node, actions: Actions) -> None:
        self._issue(node, actions)
        while (step := node.replica.next_step()) is not None:
            node.steps.append(step)
        self._issue(node, node.replica.idle_report())

    def _issue(self, node: Node, actions: Actions) -> None:
        node.receives.extend(entry for entry in actions.entries if isinstance(entry, PostReceive))
        self._messages.extend(actions.messages)
