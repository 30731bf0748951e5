"""Worker: connects one rank's GPU thread to its replica's scheduler and to other ranks.

On the leader every event (a message, a step's result, a received push) goes to ``Replica``, which
returns messages to send and plan entries to issue. A follower only issues the entries of its leader
and reports received pushes to it.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

import torch

from serve.engine.executor import Callbacks, Executor
from serve.engine.plan_progress import PlanProgress
from serve.protocol.messages import AnyMessage, Heartbeat, Received
from serve.protocol.plan import Entry, Step, Stop
from serve.replica.replica import Actions, Replica
from serve.topology import FRONT_END_RANK, Topology

HEARTBEAT_S = 1.0  # the period of a heartbeat, not a poll
PAUSE_S = 5.0  # a heartbeat that is later than this shows that the process did not run


class Worker:
    """Runs on the event loop of its rank. On a leader it owns the state of the replica."""

    def __init__(
        self,
        rank: int,
        topology: Topology,
        device: torch.device,
        send: Callable[[int, AnyMessage], None],
        on_failure: Callable[[BaseException], None],
    ) -> None:
        info = topology.replica_of(rank)
        self._peers = topology.control_peers(rank)
        self._rank = rank
        self._followers = info.ranks[1:] if rank == info.leader else ()
        self._leader = info.leader
        self._num_ranks = len(info.ranks)
        self._send = send
        self._replica: Replica | None = None
        self._num_received: dict[tuple[int, int], int] = {}
        self.executor = Executor(
            asyncio.get_running_loop(),
            Callbacks(self._on_step, self._on_received, on_failure),
            device,
            num_peers=len(topology.replicas),
            progress=PlanProgress({replica.id: replica.ranks for replica in topology.replicas}),
        )

    def lead(self, replica: Replica) -> None:
        """Set the replica that this rank leads, now that it can serve requests."""
        self._replica = replica

    def on_message(self, message: AnyMessage) -> None:
        """Handle a message to the replica, or from one of its followers."""
        if isinstance(message, Received):
            self._count_received(message.prefill_replica, message.number)
        else:
            self._apply(self._leading.on_message(message))

    async def beat(self) -> None:
        """Send a heartbeat to every peer once a second, until cancelled.

        Rank 0 gets one of every rank, itself included, with the work that stands still.
        """
        due_s = time.monotonic()
        while True:
            await asyncio.sleep(HEARTBEAT_S)
            due_s += HEARTBEAT_S
            if time.monotonic() - due_s > PAUSE_S:  # this process was stopped, not its work
                self._restart_clocks()
                due_s = time.monotonic()
            for peer in self._peers:
                if peer != FRONT_END_RANK:
                    self._send(peer, Heartbeat())
            self._send(FRONT_END_RANK, self._measure_progress())
            if self._replica is not None:
                self._issue(self._replica.heartbeat())

    def _restart_clocks(self) -> None:
        self.executor.progress.restart_clocks()
        if self._replica is not None:
            self._replica.restart_clocks()

    def _measure_progress(self) -> Heartbeat:
        progress = self.executor.progress
        stalls = progress.stalls(HEARTBEAT_S)
        if self._replica is not None:
            stalls += [stall for stall in self._replica.stalls() if stall.age_s >= HEARTBEAT_S]
        return Heartbeat(progress.num_completed, progress.is_busy, tuple(stalls))

    def stop(self) -> None:
        """Issue the last entry of the plan, here and on the followers."""
        self._enqueue(Stop())

    @property
    def _leading(self) -> Replica:
        if self._replica is None:
            raise RuntimeError("a request came before the replica was ready")
        return self._replica

    def _on_step(self, token_ids: list[int]) -> None:
        self._apply(self._leading.on_step(token_ids))

    def _on_received(self, prefill_replica: int, number: int) -> None:
        if self._rank == self._leader:
            self._count_received(prefill_replica, number)
        else:
            self._send(self._leader, Received(prefill_replica, number))

    def _count_received(self, prefill_replica: int, number: int) -> None:
        """Count a push; it is received when every rank of the replica has its part."""
        push = (prefill_replica, number)
        count = self._num_received.pop(push, 0) + 1
        if count < self._num_ranks:
            self._num_received[push] = count
        else:
            self._apply(self._leading.on_received(prefill_replica, number))

    def _apply(self, actions: Actions) -> None:
        """Carry out ``actions`` of an event, then issue the steps that can be planned now."""
        self._issue(actions)
        while (step := self._leading.next_step()) is not None:
            self._enqueue(step)
        self._issue(self._leading.idle_report())

    def _issue(self, actions: Actions) -> None:
        # Messages come first, because their receivers can act on them while the GPU runs a step.
        for rank, message in actions.messages:
            self._send(rank, message)
        for entry in actions.entries:
            self._enqueue(entry)

    def _enqueue(self, entry: Entry) -> None:
        # Followers come first, so that no rank waits for them in the step's collectives. They get
        # no rows, because they do not sample.
        for_followers = Step(entry.sequences) if isinstance(entry, Step) else entry
        for follower in self._followers:
            self._send(follower, for_followers)
        self.executor.enqueue(entry)
