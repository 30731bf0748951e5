"""What a replica is giving away: prompts whose KV goes to a decode replica. Pure.

One prompt, with who owns its blocks on this side (always the sequence)::

    offered ----Ready----> lent ----Push...Push(handover)----> read out ----last ack----> gone
       |                     |                                    ^                   blocks free
       +------withdraw()-----+--- announced pushes are carried out +

A block is packed as soon as its ``Send`` entry is issued, beside the steps and not between them: a
push that waited for its place among the steps of a busy replica would wait for whole prompts. So a
block is being read until the push that carries it is acknowledged, and is free only then. A push
waits until the one before it in its staging slot is acknowledged; acknowledgements may come out of
order, for the receiver's ranks and threads report for themselves.

Blocks that the first token after the prompt does not see, for its window has passed them, do not
travel. The scheduler frees those while the prompt is computed, and no others.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from serve.protocol.messages import NUM_STAGING_SLOTS, Handover, Offer, Push, Send, Withdraw
from serve.replica.scheduler import SchedulerLimits
from serve.replica.sequence import Sequence


@dataclass(eq=False, slots=True)
class Outgoing:
    """One prompt on its way."""

    sequence: Sequence
    decode_replica: int
    next_block: int  # the first that is still to be pushed
    ready: bool = False
    num_pushes: int = 0
    num_acknowledged: int = 0
    handover: Handover | None = None  # set once token 0 is sampled
    closed: bool = False  # no push will follow

    @property
    def is_read(self) -> bool:
        """Whether an announced push may still read the blocks."""
        return self.num_acknowledged < self.num_pushes


@dataclass(slots=True)
class Link:
    """What goes to one decode replica: prompts in the order of their offers."""

    next_number: int = 0
    unacknowledged: dict[int, Outgoing] = field(default_factory=dict)  # by number of the push
    prompts: list[Outgoing] = field(default_factory=list)

    @property
    def has_slot(self) -> bool:
        """Whether the slot of the next push is free on both sides."""
        return self.next_number - NUM_STAGING_SLOTS not in self.unacknowledged


@dataclass(frozen=True, slots=True)
class PushPlan:
    """One push: the announcement and the plan entry; ``last`` if the prompt has no other."""

    decode_replica: int
    push: Push
    send: Send
    last: bool


@dataclass(frozen=True, slots=True)
class Withdrawn:
    """The end of a loan; ``is_read``: its blocks are free only after ``on_push_received``."""

    decode_replica: int
    message: Withdraw
    is_read: bool


class OutgoingTransfers:
    """The prefill side of every loan of one replica."""

    def __init__(self, replica_id: int, limits: SchedulerLimits, max_push_blocks: int) -> None:
        self._replica_id = replica_id
        self._limits = limits
        self._max_push_blocks = max_push_blocks
        self._links: dict[int, Link] = {}
        self._prompts: dict[str, Outgoing] = {}
        self._num_read_out = 0  # closed, and still being read

    def __len__(self) -> int:
        """Prompts that are offered or lent."""
        return len(self._prompts)

    def __contains__(self, request_id: str) -> bool:
        return request_id in self._prompts

    @property
    def num_sending(self) -> int:
        """Prompts that are computed and not yet gone, and whatever is still being read."""
        computed = sum(outgoing.handover is not None for outgoing in self._prompts.values())
        return computed + self._num_read_out

    def offer(self, sequence: Sequence, decode_replica: int) -> Offer:
        """An admitted prompt: ask the decode replica for blocks."""
        first_block = self._limits.num_out_of_window_blocks(sequence.num_prompt_tokens)
        outgoing = Outgoing(sequence, decode_replica, first_block)
        self._prompts[sequence.id] = outgoing
        self._links.setdefault(decode_replica, Link()).prompts.append(outgoing)
        return Offer(self._replica_id, sequence.request)

    def on_ready(self, request_id: str) -> None:
        """The decode replica has reserved the blocks. Unknown ids are ignored."""
        if outgoing := self._prompts.get(request_id):
            outgoing.ready = True

    def on_push_received(self, decode_replica: int, number: int) -> Sequence | None:
        """The staging slot of push ``number`` to ``decode_replica`` is free again.

        Returns the sequence whose blocks nobody reads any more, if this was what was waited for.
        """
        outgoing = self._links[decode_replica].unacknowledged.pop(number)
        outgoing.num_acknowledged += 1
        if not outgoing.closed or outgoing.is_read:
            return None
        self._num_read_out -= 1
        return outgoing.sequence

    def hand_over(self, request_id: str, handover: Handover) -> None:
        """The prompt is computed and token 0 sampled: its last push may go."""
        self._prompts[request_id].handover = handover

    def withdraw(self, request_id: str) -> Withdrawn | None:
        """End the loan without a last push: what to tell the decode replica.

        None if nothing is offered under this id (its last push is announced, or it never was).
        """
        outgoing = self._prompts.get(request_id)
        if outgoing is None:
            return None
        self._close(outgoing)
        message = Withdraw(request_id, outgoing.num_pushes)
        return Withdrawn(outgoing.decode_replica, message, outgoing.is_read)

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
        complete = sequence.num_computed // self._limits.block_size
        if outgoing.handover is not None:
            complete = len(sequence.block_table)
        return min(complete - outgoing.next_block, self._max_push_blocks)

    def _push(self, decode_replica: int, link: Link, outgoing: Outgoing) -> PushPlan:
        sequence, first = outgoing.sequence, outgoing.next_block
        count = self._num_pushable(outgoing)
        outgoing.next_block += count
        outgoing.num_pushes += 1
        last = outgoing.handover is not None and first + count == len(sequence.block_table)
        number, link.next_number = link.next_number, link.next_number + 1
        link.unacknowledged[number] = outgoing
        if last:
            self._close(outgoing)
        handover = outgoing.handover if last else None
        return PushPlan(
            decode_replica,
            Push(self._replica_id, number, sequence.id, first, count, handover),
            Send(decode_replica, number, tuple(sequence.block_table[first : first + count])),
            last,
        )

    def _close(self, outgoing: Outgoing) -> None:
        outgoing.closed = True
        self._num_read_out += outgoing.is_read
        del self._prompts[outgoing.sequence.id]
        self._links[outgoing.decode_replica].prompts.remove(outgoing)
