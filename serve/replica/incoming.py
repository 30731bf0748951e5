"""IncomingTransfers: the decode side of KV transfers, from the offer to the last push. Pure.

The states of one request, with the owner of its blocks::

    Offer --> offered --reserve()--> reserved --last push received--> received
              no blocks              blocks owned by the              blocks owned by
                 |                   reservation; the prefill         the sequence
                 |                   replica may fill them
                 |                     |
                 |                     +-- Withdraw or abort --> closing
                 |                                               blocks are freed when every
                 |                                               announced push is received
                 +-- Withdraw or abort --> forgotten

The prefill side ends a reservation with its last push or with ``Withdraw(num_pushes)``. An aborted
reservation waits for that end too, because until then a transfer may still write to its blocks.

With a sliding window, the first decoded token does not see the first blocks of a long prompt. Those
are neither reserved nor sent. Both sides compute the first block that is needed from the length of
the prompt and the model's window.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Collection
from dataclasses import dataclass, field

from serve.model_config.kv_layout import num_blocks_for
from serve.protocol.messages import DetokenizerState, Handover, Offer, Push, Withdraw
from serve.protocol.plan import PostReceive, Unpack
from serve.replica.block_pool import BlockPool
from serve.replica.limits import SchedulerLimits
from serve.replica.sequence import OUT_OF_WINDOW_BLOCK, Sequence
from serve.replica.token_ids import TokenIds
from serve.request import Request, Timeline


@dataclass(eq=False, slots=True)
class Reservation:
    """Blocks reserved for the prompt of one request."""

    request: Request
    prefill_replica: int
    first_block: int  # index in the prompt of the first of ``blocks``
    blocks: list[int]
    number: int  # age on this replica
    num_announced: int = 0
    num_received: int = 0
    num_expected: int | None = None  # pushes in all; None until the prefill side has said so
    handover: Handover | None = None
    aborted: bool = False
    timeline: Timeline = field(default_factory=Timeline)

    @property
    def complete(self) -> bool:
        """Whether the prefill side has ended the reservation and every push is received."""
        return self.num_expected is not None and self.num_received == self.num_expected


@dataclass(frozen=True, slots=True)
class ReceivedSequence:
    """A sequence whose KV is complete on this replica, and the state of its detokeniser."""

    sequence: Sequence
    detokenizer_state: DetokenizerState


@dataclass(frozen=True, slots=True)
class ReceivedPush:
    """The plan entry that unpacks a push; ``completed`` is set if it was the sequence's last."""

    unpack: Unpack
    completed: ReceivedSequence | None


class IncomingTransfers:
    """The offers, reservations and announced pushes of one replica's decode side."""

    def __init__(
        self, pool: BlockPool, limits: SchedulerLimits, clock: Callable[[], float]
    ) -> None:
        self._pool = pool
        self._limits = limits
        self._clock = clock
        self._offers: OrderedDict[str, Offer] = OrderedDict()  # oldest first
        self._reservations: dict[str, Reservation] = {}
        self._pushes: dict[tuple[int, int], tuple[Reservation, Push]] = {}

    @property
    def num_offered(self) -> int:
        """Offers without blocks."""
        return len(self._offers)

    @property
    def reservations(self) -> Collection[Reservation]:
        """The reservations that have not ended."""
        return self._reservations.values()

    @property
    def num_reserved(self) -> int:
        """Reservations that have not ended."""
        return len(self._reservations)

    @property
    def oldest_offer(self) -> Offer | None:
        """The offer that gets blocks next."""
        return next(iter(self._offers.values()), None)

    def num_blocks_for(self, offer: Offer) -> int:
        """Return how many blocks an offer needs here."""
        length = offer.request.num_prompt_tokens
        first = self._limits.num_out_of_window_blocks(length)
        # One position more than the prompt, so that the first decode step always has its block.
        return num_blocks_for(length + 1, self._limits.block_size) - first

    def on_offer(self, offer: Offer) -> None:
        """Queue an offer until blocks are reserved for it."""
        self._offers[offer.request.id] = offer

    def reserve(
        self, fits: Callable[[Request, int], bool], next_number: Callable[[], int]
    ) -> list[Offer]:
        """Reserve blocks for offers, oldest first, as long as ``fits(request, num_blocks)``.

        Returns the offers to answer with Ready.
        """
        granted: list[Offer] = []
        while (offer := self.oldest_offer) is not None:
            needed = self.num_blocks_for(offer)
            if not fits(offer.request, needed):
                break
            del self._offers[offer.request.id]
            first = self._limits.num_out_of_window_blocks(offer.request.num_prompt_tokens)
            blocks = self._pool.allocate(needed)
            reservation = Reservation(
                offer.request, offer.prefill_replica, first, blocks, next_number()
            )
            self._reservations[offer.request.id] = reservation
            granted.append(offer)
        return granted

    def on_push(self, push: Push) -> PostReceive:
        """Return the plan entry that receives an announced push.

        Its reservation exists: pushes start only after Ready, and the reservation ends after the
        last one.
        """
        reservation = self._reservations[push.request_id]
        reservation.num_announced += 1
        if reservation.timeline.transfer_started_s is None:
            reservation.timeline.transfer_started_s = self._clock()
        if push.handover is not None:
            reservation.handover = push.handover
            reservation.num_expected = reservation.num_announced
        self._pushes[push.prefill_replica, push.number] = (reservation, push)
        return PostReceive(push.prefill_replica, push.number, push.num_blocks)

    def on_received(self, prefill_replica: int, number: int) -> ReceivedPush:
        """Unpack a push that every rank of this replica has in its staging slot."""
        reservation, push = self._pushes.pop((prefill_replica, number))
        reservation.num_received += 1
        first = push.first_block - reservation.first_block
        blocks = reservation.blocks[first : first + push.num_blocks]
        # An aborted request needs no KV: the empty entry only frees the staging slot.
        block_ids = () if reservation.aborted else tuple(blocks)
        unpack = Unpack(prefill_replica, number, block_ids)
        return ReceivedPush(unpack, self._end_if_complete(reservation))

    def on_withdraw(self, withdraw: Withdraw) -> None:
        """End an offer or a reservation without a last push."""
        self._offers.pop(withdraw.request_id, None)
        if reservation := self._reservations.get(withdraw.request_id):
            reservation.num_expected = withdraw.num_pushes
            reservation.aborted = True
            self._end_if_complete(reservation)

    def abort(self, request_id: str) -> None:
        """Forget a request as soon as no transfer writes to its blocks. Ignore unknown ids."""
        self._offers.pop(request_id, None)
        if reservation := self._reservations.get(request_id):
            reservation.aborted = True

    def _end_if_complete(self, reservation: Reservation) -> ReceivedSequence | None:
        if not reservation.complete:
            return None
        del self._reservations[reservation.request.id]
        if reservation.aborted or reservation.handover is None:
            self._pool.free(reservation.blocks)
            return None
        return self._make_sequence(reservation, reservation.handover)

    def _make_sequence(self, reservation: Reservation, handover: Handover) -> ReceivedSequence:
        reservation.timeline.transfer_ended_s = reservation.timeline.decode_queued_s = self._clock()
        sequence = Sequence(
            request=reservation.request,
            number=reservation.number,
            decodes_here=True,
            token_ids=TokenIds(reservation.request.prompt, handover.output_ids),
            num_computed=reservation.request.num_prompt_tokens,
            num_scheduled=reservation.request.num_prompt_tokens,
            block_table=[OUT_OF_WINDOW_BLOCK] * reservation.first_block + reservation.blocks,
            num_out_of_window_blocks=reservation.first_block,
            timeline=reservation.timeline,
        )
        return ReceivedSequence(sequence, handover.text)
