"""What a replica is being given: loans of its blocks to prefill replicas. Pure.

One loan, with who may touch its blocks::

    Offer --> offered --reserve()--> lent --Push(handover)--> all received --> arrived
              no blocks              blocks owned by the loan;                 blocks owned by
                 |                   prefill replica may fill them             the sequence
                 |                     |
                 +-- Withdraw, abort   +-- Withdraw(num_pushes) or abort: closing
                     forgotten             blocks free once every announced push was received

An aborted loan still waits for the end that the prefill side announces (a last push or a Withdraw):
until then a transfer may be under way.

Blocks of the prompt that its first decoded token does not see are neither reserved nor sent: both
sides derive the first one that is from the prompt's length and the model's window.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from serve.protocol.messages import (
    DetokenizerState,
    Handover,
    Offer,
    PostReceive,
    Push,
    Unpack,
    Withdraw,
)
from serve.replica.block_pool import BlockPool
from serve.replica.scheduler import SchedulerLimits
from serve.replica.sequence import OUT_OF_WINDOW_BLOCK, Sequence
from serve.request import Request, Timeline


@dataclass(eq=False, slots=True)
class Reservation:
    """Blocks reserved for the prompt of one request."""

    request: Request
    prefill_replica: int
    first_block: int  # of the prompt, that is in ``blocks``
    blocks: list[int]
    number: int  # age on this replica
    num_announced: int = 0
    num_received: int = 0
    num_expected: int | None = None  # pushes in all, once the prefill side has told
    handover: Handover | None = None
    aborted: bool = False
    timeline: Timeline = field(default_factory=Timeline)

    @property
    def complete(self) -> bool:
        """The prefill side has ended the loan and every announced push is received."""
        return self.num_expected is not None and self.num_received == self.num_expected


@dataclass(frozen=True, slots=True)
class Arrival:
    """A sequence that has all its KV here, and where its detokeniser stopped."""

    sequence: Sequence
    text: DetokenizerState


@dataclass(frozen=True, slots=True)
class Received:
    """One push out of its staging slot; ``arrival`` if it completed a sequence."""

    unpack: Unpack
    arrival: Arrival | None


class IncomingTransfers:
    """The decode side of every loan of one replica."""

    def __init__(
        self, pool: BlockPool, limits: SchedulerLimits, clock: Callable[[], float]
    ) -> None:
        self._pool = pool
        self._limits = limits
        self._clock = clock
        self._offers: dict[str, Offer] = {}  # in the order of their arrival
        self._reservations: dict[str, Reservation] = {}
        self._pushes: dict[tuple[int, int], tuple[Reservation, Push]] = {}

    @property
    def num_offered(self) -> int:
        """Offers that wait for blocks."""
        return len(self._offers)

    @property
    def num_reserved(self) -> int:
        """Loans that have not ended."""
        return len(self._reservations)

    def on_offer(self, offer: Offer) -> None:
        """A prompt is admitted elsewhere and wants blocks here."""
        self._offers[offer.request.id] = offer

    def reserve(self, fits: Callable[[int], bool], next_number: Callable[[], int]) -> list[Offer]:
        """Lend blocks to waiting offers, in order, while ``fits(num_blocks)``: those to answer."""
        granted: list[Offer] = []
        for offer in list(self._offers.values()):
            length = len(offer.request.prompt_ids)
            first = self._limits.num_out_of_window_blocks(length)
            # One more position: the first token that is decoded here is never short of a block.
            needed = -(-(length + 1) // self._limits.block_size) - first
            if not fits(needed):
                break
            del self._offers[offer.request.id]
            blocks = self._pool.allocate(needed)
            reservation = Reservation(
                offer.request, offer.prefill_replica, first, blocks, next_number()
            )
            self._reservations[offer.request.id] = reservation
            granted.append(offer)
        return granted

    def on_push(self, push: Push) -> PostReceive:
        """A push is announced. Every one belongs to a loan: they are made before and end after."""
        reservation = self._reservations[push.request_id]
        reservation.num_announced += 1
        if reservation.timeline.transfer_started_s is None:
            reservation.timeline.transfer_started_s = self._clock()
        if push.handover is not None:
            reservation.handover = push.handover
            reservation.num_expected = reservation.num_announced
        self._pushes[push.prefill_replica, push.number] = (reservation, push)
        return PostReceive(push.prefill_replica, push.number, push.num_blocks)

    def on_received(self, prefill_replica: int, number: int) -> Received:
        """Every rank has the push in its staging slot."""
        reservation, push = self._pushes.pop((prefill_replica, number))
        reservation.num_received += 1
        first = push.first_block - reservation.first_block
        wanted = reservation.blocks[first : first + push.num_blocks]
        block_ids = () if reservation.aborted else tuple(wanted)
        return Received(Unpack(prefill_replica, number, block_ids), self._settle(reservation))

    def on_withdraw(self, withdraw: Withdraw) -> None:
        """The prefill side ends the loan (or takes back the offer) without a last push."""
        self._offers.pop(withdraw.request_id, None)
        if reservation := self._reservations.get(withdraw.request_id):
            reservation.num_expected = withdraw.num_pushes
            reservation.aborted = True
            self._settle(reservation)

    def discard(self, request_id: str) -> None:
        """The request is closed; unknown ids are ignored."""
        self._offers.pop(request_id, None)
        if reservation := self._reservations.get(request_id):
            reservation.aborted = True

    def _settle(self, reservation: Reservation) -> Arrival | None:
        if not reservation.complete:
            return None
        del self._reservations[reservation.request.id]
        if reservation.aborted or reservation.handover is None:
            self._pool.free(reservation.blocks)
            return None
        return self._arrive(reservation, reservation.handover)

    def _arrive(self, reservation: Reservation, handover: Handover) -> Arrival:
        reservation.timeline.transfer_ended_s = reservation.timeline.decode_queued_s = self._clock()
        sequence = Sequence(
            request=reservation.request,
            number=reservation.number,
            decodes_here=True,
            token_ids=[*reservation.request.prompt_ids, *handover.output_ids],
            num_computed=len(reservation.request.prompt_ids),
            num_scheduled=len(reservation.request.prompt_ids),
            block_table=[OUT_OF_WINDOW_BLOCK] * reservation.first_block + reservation.blocks,
            num_out_of_window_blocks=reservation.first_block,
            timeline=reservation.timeline,
        )
        return Arrival(sequence, handover.text)
