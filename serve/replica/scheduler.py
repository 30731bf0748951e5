"""Which sequences of a replica run in the next step, and with how many tokens. Pure.

A sequence is in one of three places; the blocks in its table are owned by the sequence::

                 add()                    schedule(): all blocks of its tokens fit
    (new) ----------------> waiting ------------------------------------------> running
                            no blocks <---------------------------------------- has blocks
                               ^            preemption: blocks freed               ^
                               | preemption                                        | a place is free
                               +----------------------- arrived <------------------+
                                                        has blocks, KV received
                                          add_arrived()

``remove()`` takes a sequence out of any of them; the blocks go with it.

Where every layer of the model sees a window only, a running sequence lets go of the blocks that its
window has passed, when a step's result is known. It is still admitted only if all blocks of its
tokens fit at once: then it can always finish its prompt, and nobody waits for another in a circle.
"""

from __future__ import annotations

import bisect
from collections import deque
from dataclasses import dataclass

from serve.replica.block_pool import BlockPool
from serve.replica.queue_order import QueueOrder, fcfs
from serve.replica.sequence import Sequence


@dataclass(frozen=True, slots=True)
class SchedulerLimits:
    """What a step may hold, and how far back it reads.

    A token at position ``p`` reads positions ``> p - window``: the largest window of the model's
    layers, in tokens; None if some layer sees everything.
    """

    max_num_seqs: int
    max_num_batched_tokens: int
    enable_chunked_prefill: bool
    block_size: int
    window: int | None = None

    def num_out_of_window_blocks(self, position: int) -> int:
        """Leading blocks of a sequence that no token at ``position`` or later reads."""
        if self.window is None:
            return 0
        # The token before is kept in any case, so that a prompt always has a block to hand over.
        first_kept = position + 1 - max(self.window, 2)
        return max(first_kept, 0) // self.block_size


@dataclass(frozen=True, slots=True)
class Chunk:
    """The ``num_tokens`` tokens of ``sequence`` from position ``start`` on.

    ``sample`` if they are its last ones. ``source`` is set if the only token is not known yet: the
    row of the step before that samples it.
    """

    sequence: Sequence
    start: int
    num_tokens: int
    sample: bool
    source: int | None
    num_preemptions: int  # of the sequence: what was planned before one is void


@dataclass(frozen=True, slots=True)
class Batch:
    """The plan of one step. ``admitted`` and ``preempted`` are what changed to make it."""

    chunks: tuple[Chunk, ...]
    admitted: tuple[Sequence, ...]
    preempted: tuple[Sequence, ...]


class Scheduler:
    """Continuous batching over one ``BlockPool``: running decodes first, then prefill chunks.

    Decode and chunked prefill share a token budget (Sarathi-Serve, OSDI'24, section 4.2). When
    blocks run out, the youngest sequence is preempted and later computed again.
    """

    def __init__(
        self, pool: BlockPool, limits: SchedulerLimits, queue_order: QueueOrder = fcfs
    ) -> None:
        self.waiting: deque[Sequence] = deque()  # sorted by ``queue_order``
        self.arrived: deque[Sequence] = deque()
        self.running: list[Sequence] = []  # oldest first
        self.num_preemptions = 0
        self._pool = pool
        self._limits = limits
        self._queue_order = queue_order

    def add(self, sequence: Sequence) -> None:
        """Queue a sequence whose tokens are to be computed here."""
        bisect.insort(self.waiting, sequence, key=self._queue_order)

    def add_arrived(self, sequence: Sequence) -> None:
        """Queue a sequence whose KV came from elsewhere, in blocks that it now owns."""
        self.arrived.append(sequence)

    def remove(self, sequence: Sequence) -> None:
        """Forget a sequence; its blocks go with it to the caller."""
        for place in (self.running, self.waiting, self.arrived):
            if sequence in place:
                place.remove(sequence)
                return
        raise ValueError(f"sequence {sequence.id} is not scheduled here")

    def holds(self, sequence: Sequence) -> bool:
        """Whether the sequence waits or runs here."""
        return any(sequence in place for place in (self.running, self.waiting, self.arrived))

    @property
    def num_unfinished_tokens(self) -> int:
        """Tokens whose KV is still to be computed, over all sequences here."""
        places = (self.running, self.waiting, self.arrived)
        return sum(sequence.num_remaining for place in places for sequence in place)

    @property
    def num_growing(self) -> int:
        """Sequences that may need one more block at their next token."""
        return sum(sequence.decodes_here for sequence in self.running) + len(self.arrived)

    def can_reserve(self, num_blocks: int, *, num_reserved: int) -> bool:
        """Whether blocks may be promised to a newcomer without driving others out.

        Preempted sequences come first. Whoever runs keeps a block in reserve, unless nothing runs
        and nothing is lent: then the newcomer has the pool for itself.
        """
        if self.waiting:
            return False
        reserve = self.num_growing + num_reserved
        return num_blocks + reserve <= self._pool.num_free or (
            reserve == 0 and num_blocks <= self._pool.num_free
        )

    def schedule(self) -> Batch | None:
        """The next step, or None if nothing can run. Allocates the blocks that it needs.

        The step before may still run: of the tokens that it samples the KV can be planned, since
        only their values are missing. Two steps before must have been given to ``update``.
        """
        preempted: list[Sequence] = []
        self._start_arrived()
        chunks = self._schedule_decodes(preempted)
        budget = self._limits.max_num_batched_tokens - len(chunks)
        budget = self._continue_prefills(chunks, budget)
        admitted = [] if preempted else self._admit(chunks, budget)
        if not chunks:
            return None
        for row, sequence in enumerate(chunk.sequence for chunk in chunks if chunk.sample):
            sequence.row = row
        return Batch(tuple(chunks), tuple(admitted), tuple(preempted))

    def update(self, batch: Batch) -> None:
        """The step of ``batch`` is computed: its tokens' KV is in the blocks, its samples known.

        The caller appends them to the sequences that still want them.
        """
        for chunk in batch.chunks:
            sequence = chunk.sequence
            if chunk.num_preemptions == sequence.num_preemptions:
                sequence.num_computed += chunk.num_tokens
                self._free_out_of_window(sequence)
            if chunk.sample:
                sequence.num_pending -= 1

    def _free_out_of_window(self, sequence: Sequence) -> None:
        """Free what the window has passed: a step in flight begins at ``num_computed`` or later."""
        count = self._limits.num_out_of_window_blocks(sequence.num_computed)
        # Of a sequence that has ended the blocks are another's to free.
        if count > sequence.num_out_of_window_blocks and sequence in self.running:
            self._pool.free(sequence.drop_out_of_window_blocks(count))

    def _start_arrived(self) -> None:
        while self.arrived and len(self.running) < self._limits.max_num_seqs:
            self._run(self.arrived.popleft())

    def _run(self, sequence: Sequence) -> None:
        bisect.insort(self.running, sequence, key=lambda other: other.number)

    def _schedule_decodes(self, preempted: list[Sequence]) -> list[Chunk]:
        chunks: list[Chunk] = []
        # Oldest first, so that a victim is never in the batch already.
        for sequence in list(self.running):
            if len(chunks) == self._limits.max_num_batched_tokens:
                break
            if sequence.num_remaining != 1 or sequence.is_ending or sequence in preempted:
                continue
            if self._grow(sequence, preempted):
                chunks.append(_plan(sequence, 1))
        return chunks

    def _grow(self, sequence: Sequence, preempted: list[Sequence]) -> bool:
        """Give ``sequence`` the block of its next position; False if it had to give way itself."""
        if sequence.num_tokens <= len(sequence.block_table) * self._limits.block_size:
            return True
        while self._pool.num_free == 0:
            victim = self.arrived[-1] if self.arrived else self.running[-1]
            self._preempt(victim)
            preempted.append(victim)
            if victim is sequence:
                return False
        sequence.block_table += self._pool.allocate(1)
        return True

    def _preempt(self, victim: Sequence) -> None:
        self.remove(victim)
        self._pool.free(victim.take_blocks())
        victim.num_computed = victim.num_scheduled = 0
        victim.num_preemptions += 1
        self.num_preemptions += 1
        self.add(victim)

    def _continue_prefills(self, chunks: list[Chunk], budget: int) -> int:
        for sequence in self.running:
            if sequence.num_remaining > 1 and budget > 0:
                budget -= self._take(sequence, chunks, budget)
        return budget

    def _take(self, sequence: Sequence, chunks: list[Chunk], budget: int) -> int:
        count = sequence.num_remaining
        if self._limits.enable_chunked_prefill:
            count = min(count, budget)
        chunks.append(_plan(sequence, count))
        return count

    def _admit(self, chunks: list[Chunk], budget: int) -> list[Sequence]:
        admitted: list[Sequence] = []
        while self.waiting and budget > 0 and len(self.running) < self._limits.max_num_seqs:
            sequence = self.waiting[0]
            if sequence.num_pending:  # preempted under a step that still samples it
                break
            whole = not self._limits.enable_chunked_prefill
            # A prompt over the whole budget still runs, alone.
            if whole and sequence.num_remaining > budget and chunks:
                break
            if not self._fits(sequence):
                break
            self.waiting.popleft()
            needed = self._num_blocks(len(sequence.token_ids))
            sequence.block_table = self._pool.allocate(needed)
            self._run(sequence)
            admitted.append(sequence)
            budget -= self._take(sequence, chunks, budget)
        return admitted

    def _fits(self, sequence: Sequence) -> bool:
        needed = self._num_blocks(len(sequence.token_ids))
        return needed + self.num_growing <= self._pool.num_free or (
            not self.running and needed <= self._pool.num_free
        )

    def _num_blocks(self, num_tokens: int) -> int:
        return -(-num_tokens // self._limits.block_size)


def _plan(sequence: Sequence, count: int) -> Chunk:
    """The next ``count`` tokens, which from now on count as scheduled."""
    start = sequence.num_scheduled
    is_known = start + count <= len(sequence.token_ids)
    source = None if is_known else sequence.row
    sample = count == sequence.num_remaining
    sequence.num_scheduled += count
    sequence.num_pending += sample
    return Chunk(sequence, start, count, sample, source, sequence.num_preemptions)
