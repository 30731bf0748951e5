"""Scheduler: which sequences of a replica run in the next step, and how many tokens of each. Pure.

A sequence is in one of three queues and owns the blocks in its table::

                 add()                    schedule(): all blocks of its tokens fit
    (new) ----------------> waiting ------------------------------------------> running
                            no blocks <---------------------------------------- has blocks
                               ^            preemption: blocks freed               ^
                               | preemption                                        | max_num_seqs
                               +----------------------- received <-----------------+ allows it
                                                        has blocks, KV complete
                                          add_received()

``remove()`` takes a sequence out of any queue. Its blocks stay in its table.

If every layer of the model has a sliding window, the blocks that are out of the window of a running
sequence are freed when the result of a step is known. A sequence is nevertheless admitted only if
all blocks of its tokens fit at once. So an admitted prompt can always be finished, and sequences
cannot wait for each other in a circle.
"""

from __future__ import annotations

import bisect
from collections import OrderedDict
from collections.abc import Collection
from dataclasses import dataclass

from serve.model_config.kv_layout import num_blocks_for
from serve.replica.block_pool import BlockPool
from serve.replica.decode_room import DecodeRoom, Reserved
from serve.replica.growth import Growth
from serve.replica.limits import SchedulerLimits
from serve.replica.ordered_queue import OrderedQueue
from serve.replica.queue_order import FCFS, QueueOrder
from serve.replica.sequence import Queue, Sequence
from serve.request import Request


@dataclass(frozen=True, slots=True)
class Chunk:
    """Tokens ``[start, start + num_tokens)`` of ``sequence`` that one step computes.

    ``sample`` is set if they are the last ones, so the step samples the next token. ``source`` is
    set if the input token is not known yet: the row of the previous step that samples it.
    """

    sequence: Sequence
    start: int
    num_tokens: int
    sample: bool
    source: int | None
    num_preemptions: int  # of the sequence when planned; a later preemption voids the chunk


@dataclass(frozen=True, slots=True)
class Batch:
    """The plan of one step, with the sequences that were admitted or preempted to make it."""

    chunks: tuple[Chunk, ...]
    admitted: tuple[Sequence, ...]
    preempted: tuple[Sequence, ...]


class Scheduler:
    """Continuous batching over one ``BlockPool``: running decodes first, then prefill chunks.

    Decode and chunked prefill share a token budget (Sarathi-Serve, OSDI'24, section 4.2). When
    blocks run out, the youngest sequence is preempted and recomputed later.
    """

    def __init__(
        self, pool: BlockPool, limits: SchedulerLimits, queue_order: QueueOrder = FCFS
    ) -> None:
        self.waiting = OrderedQueue(queue_order.key)
        self.received: OrderedDict[Sequence, None] = OrderedDict()  # oldest first
        self.running: list[Sequence] = []  # oldest first
        self.num_preemptions = 0
        self.room = DecodeRoom(pool, limits)
        self._pool = pool
        self._limits = limits
        self._num_decoding = 0  # running sequences that decode here
        self._num_updates = 0
        self._refused: tuple[str, int, int, int, int] | None = None  # see can_reserve

    def add(self, sequence: Sequence) -> None:
        """Queue a sequence whose KV is to be computed here."""
        self.waiting.add(sequence)
        sequence.queue = Queue.WAITING

    def add_received(self, sequence: Sequence) -> None:
        """Queue a sequence whose KV was received into blocks that it owns."""
        self.received[sequence] = None
        sequence.queue = Queue.RECEIVED

    def remove(self, sequence: Sequence) -> None:
        """Take a sequence out of its queue. The caller is responsible for its blocks then.

        Raises ``ValueError`` if the sequence is in no queue.
        """
        match sequence.queue:
            case Queue.RUNNING:
                del self.running[bisect.bisect_left(self.running, sequence.number, key=_number)]
                self._num_decoding -= sequence.decodes_here
            case Queue.WAITING:
                self.waiting.remove(sequence)
            case Queue.RECEIVED:
                del self.received[sequence]
            case None:
                raise ValueError(f"sequence {sequence.id} is not scheduled here")
        sequence.queue = None

    def holds(self, sequence: Sequence) -> bool:
        """Return whether the sequence is in one of the queues."""
        return sequence.queue is not None

    @property
    def num_growing(self) -> int:
        """Sequences that may need one more block at their next token."""
        return self._num_decoding + len(self.received)

    def can_reserve(
        self, request: Request, num_blocks: int, reserved: Collection[Reserved]
    ) -> bool:
        """Return whether ``num_blocks`` may be reserved for an offer without causing preemption.

        Waiting sequences come first, because they may have been preempted. No more are taken than
        can run and a few ahead. One block stays free for every sequence that may grow, arrived or
        ``reserved``, and all are expected to fit. If there are none, it may take the whole pool.
        """
        if self.waiting:
            return False
        num_growing = self.num_growing + len(reserved)
        if num_blocks + num_growing > self._pool.num_free:
            return False
        if num_growing == 0:
            return True
        num_taken = len(self.running) + len(self.received) + len(reserved)
        if num_taken >= self._limits.max_num_seqs + self._limits.num_ahead:
            return False
        # Most events change nothing here, and counting takes a while.
        state = (request.id, self._pool.num_free, num_taken, len(self.running), self._num_updates)
        if state == self._refused:
            return False
        growths, num_owned = self._growing()
        for other in reserved:
            growths.append(self.room.expect(other.request, other.number))
            num_owned += len(other.blocks)
        fits = self.room.fits([*growths, self.room.expect(request, 0)], num_owned)
        self._refused = None if fits else state
        return fits

    def schedule(self) -> Batch | None:
        """Plan the next step and allocate its blocks. Return None if nothing can run.

        The previous step may still run: the tokens that it samples can be scheduled, because only
        their ids are missing. The step before that must have been passed to ``update``.
        """
        preempted: list[Sequence] = []
        self._start_received()
        chunks = self._schedule_decodes(preempted)
        budget = self._limits.max_num_batched_tokens - len(chunks)
        budget = self._continue_prefills(chunks, budget)
        # A new sequence could take the blocks that a preemption has just freed.
        admitted = [] if preempted else self._admit(chunks, budget)
        if not chunks:
            return None
        for row, sequence in enumerate(chunk.sequence for chunk in chunks if chunk.sample):
            sequence.row = row
        return Batch(tuple(chunks), tuple(admitted), tuple(preempted))

    def update(self, batch: Batch) -> None:
        """Note that the step of ``batch`` is computed, so the KV of its tokens is in the blocks.

        The caller appends the sampled tokens to the sequences that have not ended.
        """
        self._num_updates += 1
        for chunk in batch.chunks:
            sequence = chunk.sequence
            if chunk.num_preemptions == sequence.num_preemptions:
                sequence.num_computed += chunk.num_tokens
                self._free_out_of_window(sequence)
            if chunk.sample:
                sequence.num_pending -= 1

    def _free_out_of_window(self, sequence: Sequence) -> None:
        """Free the blocks that are out of the window of every token still to be computed."""
        # Steps in flight start at ``num_computed`` or later, so they do not read these blocks.
        count = self._limits.num_out_of_window_blocks(sequence.num_computed)
        # The blocks of a sequence that has ended are not the scheduler's to free.
        if count > sequence.num_out_of_window_blocks and sequence.queue is Queue.RUNNING:
            self._pool.free(sequence.drop_out_of_window_blocks(count))

    def _start_received(self) -> None:
        while self.received and len(self.running) < self._limits.max_num_seqs:
            self._add_running(self.received.popitem(last=False)[0])

    def _add_running(self, sequence: Sequence) -> None:
        bisect.insort(self.running, sequence, key=_number)
        self._num_decoding += sequence.decodes_here
        sequence.queue = Queue.RUNNING

    def _schedule_decodes(self, preempted: list[Sequence]) -> list[Chunk]:
        chunks: list[Chunk] = []
        # Oldest first: victims are the youngest, so they are never in the batch already.
        for sequence in list(self.running):
            if len(chunks) == self._limits.max_num_batched_tokens:
                break
            if sequence.num_remaining != 1 or sequence.is_ending or sequence in preempted:
                continue
            if self._grow(sequence, preempted):
                chunks.append(_schedule_tokens(sequence, 1))
        return chunks

    def _grow(self, sequence: Sequence, preempted: list[Sequence]) -> bool:
        """Allocate the block of the next position. Return False if ``sequence`` was preempted."""
        if sequence.num_tokens <= len(sequence.block_table) * self._limits.block_size:
            return True
        while self._pool.num_free == 0:
            victim = next(reversed(self.received)) if self.received else self.running[-1]
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
                budget -= self._schedule_prefill(sequence, chunks, budget)
        return budget

    def _schedule_prefill(self, sequence: Sequence, chunks: list[Chunk], budget: int) -> int:
        count = sequence.num_remaining
        if self._limits.enable_chunked_prefill:
            count = min(count, budget)
        chunks.append(_schedule_tokens(sequence, count))
        return count

    def _admit(self, chunks: list[Chunk], budget: int) -> list[Sequence]:
        admitted: list[Sequence] = []
        while self.waiting and budget > 0 and len(self.running) < self._limits.max_num_seqs:
            sequence = self.waiting.first
            if sequence.num_pending:  # preempted while a step in flight samples its next token
                break
            whole = not self._limits.enable_chunked_prefill
            # A prompt that exceeds the budget of an empty step runs alone.
            if whole and sequence.num_remaining > budget and chunks:
                break
            if not self._fits(sequence):
                break
            self.waiting.remove(sequence)
            needed = num_blocks_for(len(sequence.token_ids), self._limits.block_size)
            sequence.block_table = self._pool.allocate(needed)
            self._add_running(sequence)
            admitted.append(sequence)
            budget -= self._schedule_prefill(sequence, chunks, budget)
        return admitted

    def _fits(self, sequence: Sequence) -> bool:
        needed = num_blocks_for(len(sequence.token_ids), self._limits.block_size)
        if not self.running:
            return needed <= self._pool.num_free
        if needed + self.num_growing > self._pool.num_free:
            return False
        if sequence.num_preemptions == 0:
            return True
        growths, num_owned = self._growing()  # or it would outgrow the pool once more
        return self.room.fits([*growths, self._expect(sequence)], num_owned)

    def _growing(self) -> tuple[list[Growth], int]:
        """Return how the sequences that decode here go on, and how many blocks they own."""
        sequences = [one for one in self.running if one.decodes_here] + list(self.received)
        return list(map(self._expect, sequences)), sum(one.num_owned_blocks for one in sequences)

    def _expect(self, sequence: Sequence) -> Growth:
        return self.room.expect(sequence.request, sequence.number, sequence.num_output_tokens)


def _number(sequence: Sequence) -> int:
    return sequence.number


def _schedule_tokens(sequence: Sequence, count: int) -> Chunk:
    """Schedule the next ``count`` tokens of ``sequence``."""
    start = sequence.num_scheduled
    is_known = start + count <= len(sequence.token_ids)
    source = None if is_known else sequence.row
    sample = count == sequence.num_remaining
    sequence.num_scheduled += count
    sequence.num_pending += sample
    return Chunk(sequence, start, count, sample, source, sequence.num_preemptions)
