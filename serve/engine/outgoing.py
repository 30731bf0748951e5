"""What a replica is giving away: prompts whose KV goes to a decode replica. Pure.

One prompt, with who owns its blocks on this side (always the sequence)::

    offered ----Ready----> lent ----Push...Push(handover)----> gone     blocks free: all packed
       |                     |
       +------withdraw()-----+-----> gone     announced pushes are still carried out

A block is packed in plan order on the stream that also writes KV, so it may be reused as soon as
its ``Send`` entry is issued. A push waits until the one before it in its staging slot is
acknowledged; acknowledgements may come out of order, for the receiver's ranks and threads report
for themselves.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from serve.comm.messages import NUM_STAGING_SLOTS, Handover, Offer, Push, Send, Withdraw
from serve.engine.sequence import Sequence


@dataclass(eq=False, slots=True)
class Outgoing:
    """One prompt on its way."""

    sequence: Sequence
    decode_replica: int
    ready: bool = False
    num_pushed_blocks: int = 0
    num_pushes: int = 0
    handover: Handover | None = None  # set once token 0 is sampled


@dataclass(slots=True)
class Link:
    """What goes to one decode replica: prompts in the order of their offers."""

    next_number: int = 0
    unacknowledged: set[int] = field(default_factory=set)  # numbers of pushes
    prompts: list[Outgoing] = field(default_factory=list)

    @property
    def has_slot(self) -> bool:
        """Whether the slot of the next push is free on both sides."""
        return self.next_number - NUM_STAGING_SLOTS not in self.unacknowledged


@dataclass(frozen=True, slots=True)
class PushPlan:
    """One push: the announcement, the plan entry, and the sequence if it was its last."""

    decode_replica: int
    push: Push
    send: Send
    finished: Sequence | None


class OutgoingTransfers:
    """The prefill side of every loan of one replica."""

    def __init__(self, replica_id: int, block_size: int, max_push_blocks: int) -> None:
        self._replica_id = replica_id
        self._block_size = block_size
        self._max_push_blocks = max_push_blocks
        self._links: dict[int, Link] = {}
        self._prompts: dict[str, Outgoing] = {}

    def __len__(self) -> int:
        """Prompts that are offered or lent."""
        return len(self._prompts)

    def __contains__(self, request_id: str) -> bool:
        return request_id in self._prompts

    @property
    def num_sending(self) -> int:
        """Prompts that are computed and not yet gone."""
        return sum(outgoing.handover is not None for outgoing in self._prompts.values())

    def offer(self, sequence: Sequence, decode_replica: int) -> Offer:
        """An admitted prompt: ask the decode replica for blocks."""
        outgoing = Outgoing(sequence, decode_replica)
        self._prompts[sequence.id] = outgoing
        self._links.setdefault(decode_replica, Link()).prompts.append(outgoing)
        return Offer(self._replica_id, sequence.request)

    def on_ready(self, request_id: str) -> None:
        """The decode replica has reserved the blocks. Unknown ids are ignored."""
        if outgoing := self._prompts.get(request_id):
            outgoing.ready = True

    def on_push_received(self, decode_replica: int, number: int) -> None:
        """The staging slot of push ``number`` to ``decode_replica`` is free again."""
        self._links[decode_replica].unacknowledged.remove(number)

    def hand_over(self, request_id: str, handover: Handover) -> None:
        """The prompt is computed and token 0 sampled: its last push may go."""
        self._prompts[request_id].handover = handover

    def withdraw(self, request_id: str) -> tuple[int, Withdraw] | None:
        """End the loan without a last push: the decode replica and what to tell it.

        None if nothing is offered under this id (its last push is announced, or it never was).
        """
        outgoing = self._prompts.get(request_id)
        if outgoing is None:
            return None
        self._close(outgoing)
        return outgoing.decode_replica, Withdraw(request_id, outgoing.num_pushes)

    def next_pushes(self) -> list[PushPlan]:
        """Every push that can go now, in the order in which it must be announced and issued."""
        plans: list[PushPlan] = []
        for decode_replica, link in self._links.items():
            while link.has_slot:
                outgoing = next((o for o in link.prompts if self._num_pushable(o) > 0), None)
                if outgoing is None:
                    break
                plans.append(self._push(decode_replica, link, outgoing))
        return plans

    def _num_pushable(self, outgoing: Outgoing) -> int:
        """Blocks that are complete, lent and not yet pushed."""
        if not outgoing.ready:
            return 0
        sequence = outgoing.sequence
        complete = sequence.num_computed // self._block_size
        if outgoing.handover is not None:
            complete = len(sequence.block_table)
        return min(complete - outgoing.num_pushed_blocks, self._max_push_blocks)

    def _push(self, decode_replica: int, link: Link, outgoing: Outgoing) -> PushPlan:
        sequence, first = outgoing.sequence, outgoing.num_pushed_blocks
        count = self._num_pushable(outgoing)
        outgoing.num_pushed_blocks += count
        outgoing.num_pushes += 1
        last = outgoing.handover is not None and first + count == len(sequence.block_table)
        number, link.next_number = link.next_number, link.next_number + 1
        link.unacknowledged.add(number)
        if last:
            self._close(outgoing)
        handover = outgoing.handover if last else None
        return PushPlan(
            decode_replica,
            Push(self._replica_id, number, sequence.id, first, count, handover),
            Send(decode_replica, number, tuple(sequence.block_table[first : first + count])),
            sequence if last else None,
        )

    def _close(self, outgoing: Outgoing) -> None:
        del self._prompts[outgoing.sequence.id]
        self._links[outgoing.decode_replica].prompts.remove(outgoing)
