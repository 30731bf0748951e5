"""OutgoingTransfers: the prefill side of KV transfers, from the offer to the last ack. Pure.

The states of one prompt. Its sequence owns the blocks until they are freed::

    offered --Ready--> reserved --Push ... Push(handover)--> draining --last ack--> blocks freed
       |                  |                                     ^
       +--- withdraw() ---+------ if a push is still unacked ---+

A reserved prompt is in the queue of its link while it has blocks to push. It enters the queue when
it becomes reserved, when a step has computed more of it, and at its handover. So the work of an
event does not grow with the number of prompts that wait.

A push is packed as soon as its ``Send`` entry is issued, on a stream of its own. In the order of
the steps, a push of a busy replica would wait for whole prompts. So a block may be read until the
push that carries it is acknowledged, and it is freed only then.

A push waits until the previous push in its staging slot is acknowledged. Acknowledgements may come
out of order, because every rank and thread of the receiver reports for itself. An announced push is
always carried out, even if its request is aborted.

Blocks that are out of the window of the first decoded token are not sent. The scheduler frees
exactly these while the prompt is computed.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field

from serve.protocol.messages import NUM_STAGING_SLOTS, Handover, Offer, Push, Withdraw
from serve.protocol.plan import Send
from serve.replica.limits import SchedulerLimits
from serve.replica.ordered_queue import OrderedQueue
from serve.replica.sequence import Sequence


@dataclass(eq=False, slots=True)
class OutgoingPrompt:
    """One prompt whose KV goes to a decode replica."""

    sequence: Sequence
    decode_replica: int
    next_block: int  # index in the block table of the first block that is not pushed
    number: int  # age of the offer
    ready: bool = False  # whether the decode replica has reserved blocks
    num_pushes: int = 0
    num_acknowledged: int = 0
    handover: Handover | None = None  # set once token 0 is sampled
    closed: bool = False  # no push will follow

    @property
    def is_being_read(self) -> bool:
        """Whether an announced push may still read the blocks."""
        return self.num_acknowledged < self.num_pushes


@dataclass(slots=True)
class Link:
    """The pushes and prompts that go to one decode replica."""

    next_number: int = 0
    unacknowledged: dict[int, OutgoingPrompt] = field(default_factory=dict)  # by push number
    # With blocks to push, in the order of their offers.
    pushable: OrderedQueue[OutgoingPrompt] = field(
        default_factory=lambda: OrderedQueue(lambda prompt: prompt.number)
    )

    @property
    def has_slot(self) -> bool:
        """Whether the staging slot of the next push is free on both sides."""
        return self.next_number - NUM_STAGING_SLOTS not in self.unacknowledged


@dataclass(frozen=True, slots=True)
class PushPlan:
    """One push: its announcement and its plan entry. ``last`` if it is the prompt's last push."""

    decode_replica: int
    push: Push
    send: Send
    last: bool


@dataclass(frozen=True, slots=True)
class Withdrawal:
    """The message that ends a transfer without a last push.

    If ``is_being_read``, the blocks may be freed only when ``on_push_received`` returns the
    sequence.
    """

    decode_replica: int
    message: Withdraw
    is_being_read: bool


class OutgoingTransfers:
    """The prompts that one replica offers and sends to decode replicas."""

    def __init__(self, replica_id: int, limits: SchedulerLimits, max_push_blocks: int) -> None:
        self._replica_id = replica_id
        self._limits = limits
        self._max_push_blocks = max_push_blocks
        self._links: dict[int, Link] = {}
        self._prompts: dict[str, OutgoingPrompt] = {}
        self._numbers = itertools.count()
        self._num_computed = 0  # prompts that wait only for their last push
        self._num_draining = 0  # closed, with a push that is not acknowledged

    def __len__(self) -> int:
        """Return the number of prompts that are offered or reserved."""
        return len(self._prompts)

    def __contains__(self, request_id: str) -> bool:
        return request_id in self._prompts

    @property
    def num_sending(self) -> int:
        """Prompts that are computed but not sent to the end, and prompts that are draining."""
        return self._num_computed + self._num_draining

    def oldest_unacknowledged(self) -> list[tuple[int, int]]:
        """Return the decode replica and the number of each link's oldest push without an ack."""
        return [
            (decode_replica, next(iter(link.unacknowledged)))
            for decode_replica, link in self._links.items()
            if link.unacknowledged
        ]

    def offer(self, sequence: Sequence, decode_replica: int) -> Offer:
        """Return the offer of an admitted prompt, which requests blocks on the decode replica."""
        first_block = self._limits.num_out_of_window_blocks(sequence.num_prompt_tokens)
        number = next(self._numbers)
        self._prompts[sequence.id] = OutgoingPrompt(sequence, decode_replica, first_block, number)
        self._links.setdefault(decode_replica, Link())
        return Offer(self._replica_id, sequence.request)

    def on_ready(self, request_id: str) -> None:
        """Note that the decode replica has reserved the blocks. Ignore unknown ids."""
        if prompt := self._prompts.get(request_id):
            prompt.ready = True
            self._queue_if_pushable(prompt)

    def on_push_received(self, decode_replica: int, number: int) -> Sequence | None:
        """Free the staging slot of push ``number`` to ``decode_replica``.

        Returns the sequence whose blocks may be freed now, if this was its last acknowledgement.
        """
        prompt = self._links[decode_replica].unacknowledged.pop(number)
        prompt.num_acknowledged += 1
        if not prompt.closed or prompt.is_being_read:
            return None
        self._num_draining -= 1
        return prompt.sequence

    def hand_over(self, request_id: str, handover: Handover) -> None:
        """Allow the last push of a prompt: it is computed and token 0 is sampled."""
        prompt = self._prompts[request_id]
        prompt.handover = handover
        self._num_computed += 1
        self._queue_if_pushable(prompt)

    def on_computed(self, request_id: str) -> None:
        """Note that a step has computed more of a prompt. Ignore unknown ids."""
        if prompt := self._prompts.get(request_id):
            self._queue_if_pushable(prompt)

    def withdraw(self, request_id: str) -> Withdrawal | None:
        """End a transfer without a last push.

        Returns None if there is nothing to end: the prompt was never offered here, or its last push
        is announced already.
        """
        prompt = self._prompts.get(request_id)
        if prompt is None:
            return None
        self._close(prompt)
        message = Withdraw(request_id, prompt.num_pushes)
        return Withdrawal(prompt.decode_replica, message, prompt.is_being_read)

    def next_pushes(self) -> list[PushPlan]:
        """Return every push that can go now, in the order to announce and issue them."""
        plans: list[PushPlan] = []
        for decode_replica, link in self._links.items():
            while link.has_slot and link.pushable:
                prompt = link.pushable.first
                plans.append(self._push(decode_replica, link, prompt))
                if self._num_pushable(prompt) <= 0:
                    link.pushable.discard(prompt)
        return plans

    def _queue_if_pushable(self, prompt: OutgoingPrompt) -> None:
        queue = self._links[prompt.decode_replica].pushable
        if prompt not in queue and self._num_pushable(prompt) > 0:
            queue.add(prompt)

    def _num_pushable(self, prompt: OutgoingPrompt) -> int:
        """Return how many blocks the next push carries: computed, reserved and not yet pushed."""
        if not prompt.ready:
            return 0
        sequence = prompt.sequence
        num_complete = sequence.num_computed // self._limits.block_size
        if prompt.handover is not None:
            num_complete = len(sequence.block_table)
        return min(num_complete - prompt.next_block, self._max_push_blocks)

    def _push(self, decode_replica: int, link: Link, prompt: OutgoingPrompt) -> PushPlan:
        sequence, first = prompt.sequence, prompt.next_block
        count = self._num_pushable(prompt)
        prompt.next_block += count
        prompt.num_pushes += 1
        last = prompt.handover is not None and first + count == len(sequence.block_table)
        number, link.next_number = link.next_number, link.next_number + 1
        link.unacknowledged[number] = prompt
        if last:
            self._close(prompt)
        handover = prompt.handover if last else None
        return PushPlan(
            decode_replica,
            Push(self._replica_id, number, sequence.id, first, count, handover),
            Send(decode_replica, number, tuple(sequence.block_table[first : first + count])),
            last,
        )

    def _close(self, prompt: OutgoingPrompt) -> None:
        prompt.closed = True
        self._num_draining += prompt.is_being_read
        self._num_computed -= prompt.handover is not None
        del self._prompts[prompt.sequence.id]
        self._links[prompt.decode_replica].pushable.discard(prompt)
