"""Replica: the decisions of a replica's leader for every message and every result. Pure.

It connects the scheduler, the transfers in both directions and the output processor. These are the
states of a request on one replica. Its sequence owns its blocks, except while they are reserved::

    Prefill --> waiting --> running --token 0, decodes elsewhere--> sending --last push--> closed
                               |                                       |
    Offer --> offered --> reserved --> received --> running            |
                 |           |            |            |               |
                 +-----------+------------+------------+---------------+--- Abort --> closed
                                                       +--- last token ------------> closed

Every method returns the messages to send and the entries to add to the plan. No method waits or
computes on the GPU.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Callable
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, field

from msgspec.structs import replace

from serve.protocol.messages import (
    Abort,
    AnyMessage,
    Delta,
    Offer,
    Prefill,
    Push,
    PushReceived,
    Ready,
    ReplicaLoad,
    Report,
    Stall,
    Withdraw,
)
from serve.protocol.plan import Entry, Step
from serve.replica.active_request import ActiveRequest
from serve.replica.block_pool import BlockPool
from serve.replica.incoming import IncomingTransfers, ReceivedSequence
from serve.replica.limits import SchedulerLimits
from serve.replica.load import measure_load
from serve.replica.outgoing import OutgoingTransfers
from serve.replica.output_processor import OutputProcessor
from serve.replica.queue_order import QUEUE_ORDERS
from serve.replica.scheduler import Batch, Scheduler
from serve.replica.sequence import Sequence
from serve.replica.standstill import Standstill, find_conditions
from serve.replica.step import build_step
from serve.replica.timeline import record_start
from serve.replica.token_ids import TokenIds
from serve.request import Request
from serve.tokenizer.tokenizer import Tokenizer
from serve.topology import FRONT_END_RANK

# One step runs, and the next one is planned and queued so that the GPU never waits for the host.
MAX_STEPS_IN_FLIGHT = 2


@dataclass(slots=True)
class Actions:
    """The messages to send, each with its rank, and the entries to add to the plan, in order."""

    messages: list[tuple[int, AnyMessage]] = field(default_factory=list)
    entries: list[Entry] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class ReplicaSettings:
    """The constants of one replica."""

    replica_id: int
    leader_of: tuple[int, ...]  # the leader's rank, by replica id
    num_blocks: int
    limits: SchedulerLimits
    max_push_blocks: int
    eos_token_ids: tuple[int, ...]
    schedule_policy: str = "fcfs"  # a name in QUEUE_ORDERS


class Replica:
    """The state of one replica, kept on its leader."""

    def __init__(
        self,
        settings: ReplicaSettings,
        tokenizer: Tokenizer | None,
        clock: Callable[[], float],
    ) -> None:
        self._settings = settings
        self._clock = clock
        self._pool = BlockPool(settings.num_blocks)
        self._scheduler = Scheduler(
            self._pool, settings.limits, QUEUE_ORDERS[settings.schedule_policy]
        )
        self._outgoing = OutgoingTransfers(
            settings.replica_id, settings.limits, settings.max_push_blocks
        )
        self._incoming = IncomingTransfers(self._pool, settings.limits, clock)
        self._outputs = OutputProcessor(tokenizer, settings.eos_token_ids, clock)
        self._active: dict[str, ActiveRequest] = {}
        self._numbers = itertools.count()
        self._in_flight: deque[Batch] = deque()  # oldest first
        self._reported_load: ReplicaLoad | None = None
        self._standstill = Standstill(clock)
        self._actions = Actions()

    # --- events -----------------------------------------------------------------------------

    def on_message(self, message: AnyMessage) -> Actions:
        """Handle a message of another rank."""
        match message:
            case Prefill():
                for request, decode_replica in message.requests:
                    self._prefill(request, decode_replica)
            case Abort(request_id):
                self._abort(request_id)
            case Offer():
                self._incoming.on_offer(message)
            case Ready(request_id):
                self._outgoing.on_ready(request_id)
            case Push():
                self._actions.entries.append(self._incoming.on_push(message))
            case PushReceived(decode_replica, number):
                if sequence := self._outgoing.on_push_received(decode_replica, number):
                    self._free_blocks(sequence)
            case Withdraw():
                self._incoming.on_withdraw(message)
            case _:
                raise TypeError(f"a replica does not handle {type(message).__name__}")
        self._advance_transfers()
        return self._take_actions()

    def on_received(self, prefill_replica: int, number: int) -> Actions:
        """Handle a push that every rank of this replica has in its staging slot."""
        received = self._incoming.on_received(prefill_replica, number)
        unpack = received.unpack
        self._send(prefill_replica, PushReceived(self._settings.replica_id, number))
        if received.completed is not None and not self._start_decode(received.completed):
            unpack = replace(unpack, block_ids=())  # the blocks are free
        self._actions.entries.append(unpack)
        self._advance_transfers()
        return self._take_actions()

    def on_step(self, token_ids: SequenceOf[int]) -> Actions:
        """Handle the result of the oldest step in flight: one token id per sampled sequence."""
        if not self._in_flight:
            raise RuntimeError("a step's result arrived, but no step is in flight")
        batch = self._in_flight.popleft()
        if self._in_flight:
            record_start(self._in_flight[0], self._clock())
        self._scheduler.update(batch)
        for chunk in batch.chunks:
            if not chunk.sequence.decodes_here:
                self._outgoing.on_computed(chunk.sequence.id)
        sampled = [chunk.sequence for chunk in batch.chunks if chunk.sample]
        deltas: list[Delta] = []
        for sequence, token_id in zip(sampled, token_ids, strict=True):
            active = self._active.get(sequence.id)
            # A sequence may have ended while the step ran: drop its token.
            if active is not None and active.sequence is sequence:
                deltas.append(self._take_token(active, token_id))
        self._advance_transfers()
        self._report(tuple(deltas), sum(chunk.num_tokens for chunk in batch.chunks))
        return self._take_actions()

    def next_step(self) -> Step | None:
        """Plan the next step. Return None if enough steps are in flight or there is no work.

        Prompts that the step admits may be offered to decode replicas: the next actions that this
        replica returns contain the offers.
        """
        if len(self._in_flight) == MAX_STEPS_IN_FLIGHT:
            return None
        batch = self._scheduler.schedule()
        if batch is None:
            return None
        self._in_flight.append(batch)
        for sequence in batch.admitted:
            self._offer(self._active[sequence.id])
        # Otherwise a step is in flight, and this one starts when that one ends: see on_step.
        if len(self._in_flight) == 1:
            record_start(batch, self._clock())
        return build_step(batch, self._settings.eos_token_ids)

    def idle_report(self) -> Actions:
        """Report the load to rank 0 if no step is in flight and it changed since the last report.

        While steps are in flight, the report of each step carries the load.
        """
        if not self._in_flight and self._measure_load() != self._reported_load:
            self._report((), 0)
        return self._take_actions()

    def heartbeat(self) -> Actions:
        """Report the load to rank 0, changed or not."""
        self._report((), 0)
        return self._take_actions()

    def stalls(self) -> list[Stall]:
        """Return what should have moved since the last call and did not, with its age."""
        conditions = find_conditions(
            self._scheduler, self._incoming, self._outgoing, is_idle=not self._in_flight
        )
        return self._standstill.look(conditions, self._settings.leader_of)

    def restart_clocks(self) -> None:
        """Count no standstill before now, because this whole process did not run for a while."""
        self._standstill.restart_clocks()

    # --- requests ---------------------------------------------------------------------------

    def _prefill(self, request: Request, decode_replica: int) -> None:
        sequence = Sequence(
            request=request,
            number=next(self._numbers),
            decodes_here=decode_replica == self._settings.replica_id,
            token_ids=TokenIds(request.prompt),
        )
        sequence.timeline.prefill_queued_s = self._clock()
        try:
            self._active[request.id] = self._outputs.start(sequence, decode_replica)
        except Exception as error:
            self._report((self._outputs.fail(sequence, error),), 0)
        else:
            self._scheduler.add(sequence)

    def _offer(self, active: ActiveRequest) -> None:
        """Request blocks on the decode replica, unless the prompt decodes here or has an offer."""
        sequence = active.sequence
        if not sequence.decodes_here and sequence.id not in self._outgoing:
            self._send(active.decode_replica, self._outgoing.offer(sequence, active.decode_replica))

    def _start_decode(self, received: ReceivedSequence) -> bool:
        """Queue a received sequence. Return False if it has failed."""
        sequence = received.sequence
        try:
            self._active[sequence.id] = self._outputs.resume(
                sequence, received.detokenizer_state, self._settings.replica_id
            )
        except Exception as error:
            self._free_blocks(sequence)
            self._report((self._outputs.fail(sequence, error),), 0)
            return False
        self._scheduler.add_received(sequence)
        return True

    def _take_token(self, active: ActiveRequest, token_id: int) -> Delta:
        try:
            processed = self._outputs.process(active, token_id)
        except Exception as error:
            self._close(active)
            return self._outputs.fail(active.sequence, error)
        if processed.finished:
            if active.sequence.decodes_here:
                self._scheduler.room.on_ended(active.sequence.num_output_tokens)
            self._close(active)
        elif processed.handover is not None:
            self._scheduler.remove(active.sequence)
            self._outgoing.hand_over(active.sequence.id, processed.handover)
        return processed.delta

    def _abort(self, request_id: str) -> None:
        self._incoming.abort(request_id)
        if active := self._active.get(request_id):
            self._close(active)

    def _close(self, active: ActiveRequest) -> None:
        """End a request on this replica, whatever its state."""
        sequence = active.sequence
        del self._active[sequence.id]
        if self._scheduler.holds(sequence):
            self._scheduler.remove(sequence)
        withdrawal = self._outgoing.withdraw(sequence.id)
        if withdrawal is not None:
            self._send(withdrawal.decode_replica, withdrawal.message)
            if withdrawal.is_being_read:  # the last acknowledgement frees the blocks
                return
        self._free_blocks(sequence)

    def _free_blocks(self, sequence: Sequence) -> None:
        self._pool.free(sequence.take_blocks())

    # --- transfers, messages, load ----------------------------------------------------------

    def _advance_transfers(self) -> None:
        """Answer the offers that fit now and announce the pushes that can go now."""
        for offer in self._incoming.reserve(self._can_reserve, lambda: next(self._numbers)):
            self._send(offer.prefill_replica, Ready(offer.request.id))
        for plan in self._outgoing.next_pushes():
            self._actions.entries.append(plan.send)
            self._send(plan.decode_replica, plan.push)
            if plan.last:
                del self._active[plan.push.request_id]

    def _can_reserve(self, request: Request, num_blocks: int) -> bool:
        return self._scheduler.can_reserve(request, num_blocks, self._incoming.reservations)

    def _send(self, replica_id: int, message: AnyMessage) -> None:
        self._actions.messages.append((self._settings.leader_of[replica_id], message))

    def _take_actions(self) -> Actions:
        actions, self._actions = self._actions, Actions()
        return actions

    def _report(self, deltas: tuple[Delta, ...], num_step_tokens: int) -> None:
        load = self._reported_load = self._measure_load()
        report = Report(self._settings.replica_id, load, deltas, num_step_tokens)
        self._actions.messages.append((FRONT_END_RANK, report))

    def _measure_load(self) -> ReplicaLoad:
        return measure_load(self._pool, self._scheduler, self._incoming, self._outgoing)
