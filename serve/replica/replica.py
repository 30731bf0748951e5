"""One replica's decisions: what its leader does about every message and every result. Pure.

It joins the scheduler with the transfers in both directions and with detokenising. A request is
here in one of these states; the blocks belong to the sequence, except in a loan::

    Prefill --> waiting --> running --token 0, decodes elsewhere--> sending --last push--> (gone)
                               |                                       |
    Offer --> offered --> lent --> arrived --> running                 |
                 |         |          |           |                    |
                 +---------+----------+-----------+--------------------+--- Abort --> (gone)
                                                  +--- last token ----------------> (gone)

Every method returns what to send and what to add to the plan; nothing here waits or computes.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Callable
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, field

from serve.protocol.messages import (
    Abort,
    AnyMessage,
    Delta,
    Entry,
    Handover,
    Offer,
    Prefill,
    Push,
    PushReceived,
    Ready,
    ReplicaLoad,
    Report,
    Step,
    Withdraw,
)
from serve.replica.active_request import ActiveRequest
from serve.replica.block_pool import BlockPool
from serve.replica.incoming import Arrival, IncomingTransfers
from serve.replica.load import measure_load
from serve.replica.outgoing import OutgoingTransfers
from serve.replica.scheduler import Batch, Scheduler, SchedulerLimits
from serve.replica.sequence import Sequence
from serve.replica.step import build_step
from serve.replica.stop_check import check_stop
from serve.replica.timeline import record_first_token, record_start
from serve.request import Request
from serve.tokenizer.detokenizer import Detokenizer
from serve.tokenizer.tokenizer import Tokenizer
from serve.topology import FRONT_END_RANK

# While one runs, the next one is prepared and waits for its turn on the GPU.
MAX_STEPS_IN_FLIGHT = 2


@dataclass(slots=True)
class Actions:
    """What follows from one event: messages by rank and plan entries, each in order."""

    messages: list[tuple[int, AnyMessage]] = field(default_factory=list)
    entries: list[Entry] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class ReplicaSettings:
    """What a replica has to know about itself and the others."""

    replica_id: int
    leader_of: tuple[int, ...]  # leader's rank by replica id
    num_blocks: int
    limits: SchedulerLimits
    max_push_blocks: int
    eos_token_ids: tuple[int, ...]


class Replica:
    """The leader's state of one replica."""

    def __init__(
        self,
        settings: ReplicaSettings,
        tokenizer: Tokenizer | None,
        clock: Callable[[], float],
    ) -> None:
        self._settings = settings
        self._tokenizer = tokenizer
        self._clock = clock
        self._pool = BlockPool(settings.num_blocks)
        self._scheduler = Scheduler(self._pool, settings.limits)
        self._outgoing = OutgoingTransfers(
            settings.replica_id, settings.limits, settings.max_push_blocks
        )
        self._incoming = IncomingTransfers(self._pool, settings.limits, clock)
        self._active: dict[str, ActiveRequest] = {}
        self._numbers = itertools.count()
        self._in_flight: deque[Batch] = deque()  # oldest first
        self._reported_load: ReplicaLoad | None = None
        self._actions = Actions()

    # --- events -----------------------------------------------------------------------------

    def on_message(self, message: AnyMessage) -> Actions:
        """What follows from a message of another rank."""
        match message:
            case Prefill(request, decode_replica):
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
                    self._release(sequence)
            case Withdraw():
                self._incoming.on_withdraw(message)
            case _:
                raise TypeError(f"a replica has no use for {type(message).__name__}")
        return self._settle()

    def on_received(self, prefill_replica: int, number: int) -> Actions:
        """Every rank of the replica has a push in its staging slot."""
        received = self._incoming.on_received(prefill_replica, number)
        self._actions.entries.append(received.unpack)
        self._send(prefill_replica, PushReceived(self._settings.replica_id, number))
        if received.arrival is not None:
            self._take_arrival(received.arrival)
        return self._settle()

    def on_step(self, token_ids: SequenceOf[int]) -> Actions:
        """The oldest step in flight is computed: ``token_ids`` has one id per sampled sequence."""
        if not self._in_flight:
            raise RuntimeError("a step's result came, but no step is in flight")
        batch = self._in_flight.popleft()
        if self._in_flight:
            record_start(self._in_flight[0], self._clock())
        self._scheduler.update(batch)
        sampled = [chunk.sequence for chunk in batch.chunks if chunk.sample]
        deltas: list[Delta] = []
        for sequence, token_id in zip(sampled, token_ids, strict=True):
            active = self._active.get(sequence.id)
            if active is not None and active.sequence is sequence:  # else it has ended meanwhile
                deltas.append(self._take_token(active, token_id))
        self._settle_transfers()
        self._report(tuple(deltas), sum(chunk.num_tokens for chunk in batch.chunks))
        return self._take_actions()

    def next_step(self) -> Step | None:
        """The next step to run, if one more may be in flight and there is work.

        The offers of the prompts that it admits are among the next actions.
        """
        if len(self._in_flight) == MAX_STEPS_IN_FLIGHT:
            return None
        batch = self._scheduler.schedule()
        if batch is None:
            return None
        self._in_flight.append(batch)
        for sequence in batch.admitted:
            self._offer(self._active[sequence.id])
        if len(self._in_flight) == 1:
            record_start(batch, self._clock())
        return build_step(batch, self._settings.eos_token_ids)

    def idle_report(self) -> Actions:
        """Tell rank 0 of the load, if it changed since it was last told."""
        if not self._in_flight and self._measure_load() != self._reported_load:
            self._report((), 0)
        return self._take_actions()

    def heartbeat(self) -> Actions:
        """Tell rank 0 of the load in any case."""
        self._report((), 0)
        return self._take_actions()

    # --- requests ---------------------------------------------------------------------------

    def _prefill(self, request: Request, decode_replica: int) -> None:
        sequence = Sequence(
            request=request,
            number=next(self._numbers),
            decodes_here=decode_replica == self._settings.replica_id,
            token_ids=list(request.prompt_ids),
        )
        sequence.timeline.prefill_queued_s = self._clock()
        text = Detokenizer(self._tokenizer, request.sampling, request.prompt_ids)
        self._active[request.id] = ActiveRequest(sequence, text, decode_replica)
        self._scheduler.add(sequence)

    def _offer(self, active: ActiveRequest) -> None:
        """An admitted prompt whose decode is elsewhere wants blocks there."""
        sequence = active.sequence
        if not sequence.decodes_here and sequence.id not in self._outgoing:
            self._send(active.decode_replica, self._outgoing.offer(sequence, active.decode_replica))

    def _take_arrival(self, arrival: Arrival) -> None:
        sequence = arrival.sequence
        text = Detokenizer.resume(self._tokenizer, sequence.request.sampling, arrival.text)
        self._active[sequence.id] = ActiveRequest(sequence, text, self._settings.replica_id)
        self._scheduler.add_arrived(sequence)

    def _take_token(self, active: ActiveRequest, token_id: int) -> Delta:
        sequence = active.sequence
        sequence.token_ids.append(token_id)
        check = check_stop(sequence, active.detokenizer, token_id, self._settings.eos_token_ids)
        if sequence.num_output_tokens == 1:
            record_first_token(sequence, self._clock())
        if check.reason is not None:
            self._close(active)
        elif not sequence.decodes_here:
            self._scheduler.remove(sequence)
            self._outgoing.hand_over(
                sequence.id, Handover(sequence.output_ids, active.detokenizer.state())
            )
        return Delta(
            request_id=sequence.id,
            first_index=sequence.num_output_tokens - 1,
            token_ids=(token_id,),
            text=check.text,
            finish_reason=check.reason,
            stop_reason=check.stop,
            timeline=active.unreported_timeline(),
        )

    def _abort(self, request_id: str) -> None:
        self._incoming.discard(request_id)
        if active := self._active.get(request_id):
            self._close(active)

    def _close(self, active: ActiveRequest) -> None:
        """The request ends here, whatever its state."""
        sequence = active.sequence
        del self._active[sequence.id]
        if self._scheduler.holds(sequence):
            self._scheduler.remove(sequence)
        withdrawn = self._outgoing.withdraw(sequence.id)
        if withdrawn is not None:
            self._send(withdrawn.decode_replica, withdrawn.message)
            if withdrawn.is_read:  # its blocks are released when that has ended
                return
        self._release(sequence)

    def _release(self, sequence: Sequence) -> None:
        """Nobody computes or reads the blocks of ``sequence`` any more."""
        self._pool.free(sequence.take_blocks())

    # --- what follows -----------------------------------------------------------------------

    def _settle(self) -> Actions:
        self._settle_transfers()
        return self._take_actions()

    def _settle_transfers(self) -> None:
        """Answer the offers that fit now and announce the pushes that can go now."""
        for offer in self._incoming.reserve(self._can_lend, lambda: next(self._numbers)):
            self._send(offer.prefill_replica, Ready(offer.request.id))
        for plan in self._outgoing.next_pushes():
            self._actions.entries.append(plan.send)
            self._send(plan.decode_replica, plan.push)
            if plan.last:
                del self._active[plan.push.request_id]

    def _can_lend(self, num_blocks: int) -> bool:
        return self._scheduler.can_reserve(num_blocks, num_reserved=self._incoming.num_reserved)

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
