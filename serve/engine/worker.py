"""One rank's share of a replica: feeds the GPU thread from the plan, and the plan from events.

On the leader every event (a message, a step's result, a received push) goes to ``Replica``, whose
answer is sent out and issued. A follower only issues what its leader sends, and says what it has
received.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import torch

from serve.engine.executor import Callbacks, Executor
from serve.protocol.messages import AnyMessage, Entry, Heartbeat, Received, Step, Stop
from serve.replica.replica import Actions, Replica
from serve.topology import FRONT_END_RANK, ReplicaInfo

HEARTBEAT_S = 1.0  # the period of a heartbeat, not a wait for something


class Worker:
    """Runs on the event loop of its rank; owns the replica's state if the rank leads it."""

    def __init__(
        self,
        rank: int,
        info: ReplicaInfo,
        num_peers: int,
        device: torch.device,
        send: Callable[[int, AnyMessage], None],
        on_failure: Callable[[BaseException], None],
    ) -> None:
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
            num_peers=num_peers,
        )

    def lead(self, replica: Replica) -> None:
        """This rank's replica is ready to take requests."""
        self._replica = replica

    def on_message(self, message: AnyMessage) -> None:
        """A message for the replica, or from one of its followers."""
        if isinstance(message, Received):
            self._count_received(message.prefill_replica, message.number)
        else:
            self._apply(self._leading.on_message(message))

    async def beat(self) -> None:
        """Tell rank 0 once a second that this rank lives, for as long as it does."""
        while True:
            await asyncio.sleep(HEARTBEAT_S)
            if self._replica is not None:
                self._issue(self._replica.heartbeat())
            elif self._rank != FRONT_END_RANK:
                self._send(FRONT_END_RANK, Heartbeat())

    def stop(self) -> None:
        """The last entry of the plan, here and on the followers."""
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
        """A push counts once every rank of the replica has it."""
        push = (prefill_replica, number)
        count = self._num_received.pop(push, 0) + 1
        if count < self._num_ranks:
            self._num_received[push] = count
        else:
            self._apply(self._leading.on_received(prefill_replica, number))

    def _apply(self, actions: Actions) -> None:
        """Carry out what follows from an event, and submit the steps that can be planned now."""
        self._issue(actions)
        while (step := self._leading.next_step()) is not None:
            self._enqueue(step)
        self._issue(self._leading.idle_report())

    def _issue(self, actions: Actions) -> None:
        # Messages first: others act on them meanwhile, and the GPU has a step in hand.
        for rank, message in actions.messages:
            self._send(rank, message)
        for entry in actions.entries:
            self._enqueue(entry)

    def _enqueue(self, entry: Entry) -> None:
        # The followers first, so that no rank waits for them in the step's collectives.
        told = Step(entry.sequences) if isinstance(entry, Step) else entry
        for follower in self._followers:
            self._send(follower, told)
        self.executor.enqueue(entry)
