"""BlockPool and Scheduler: limits, ownership of blocks, preemption of the youngest, progress."""

from __future__ import annotations

import random
from dataclasses import dataclass

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from serve.replica.block_pool import BlockPool
from serve.replica.limits import SchedulerLimits
from serve.replica.scheduler import Batch, Scheduler
from serve.replica.sequence import Sequence
from serve.replica.token_ids import TokenIds
from serve.request import Request, SamplingParams, pack_ids


def make_sequence(number: int, prompt: int, output: int, decodes_here: bool = True) -> Sequence:
    request = Request(
        id=f"s{number}",
        prompt=pack_ids(range(prompt)),
        sampling=SamplingParams(max_tokens=output),
    )
    return Sequence(request, number, decodes_here, TokenIds(request.prompt))


def finish_step(scheduler: Scheduler, pool: BlockPool, batch: Batch) -> list[Sequence]:
    """Process a step's result as a replica does. Return the sequences that ended."""
    scheduler.update(batch)
    ended = []
    for chunk in batch.chunks:
        sequence = chunk.sequence
        if not chunk.sample:
            continue
        sequence.token_ids.append(0)
        if sequence.num_output_tokens == sequence.request.sampling.max_tokens:
            scheduler.remove(sequence)
            pool.free(sequence.block_table)
            ended.append(sequence)
    return ended


@given(st.lists(st.integers(1, 6), max_size=40), st.randoms(use_true_random=False))
def test_a_block_has_one_owner(sizes: list[int], rng: random.Random) -> None:
    pool = BlockPool(16)
    owned: list[list[int]] = []
    for size in sizes:
        if size <= pool.num_free:
            owned.append(pool.allocate(size))
        elif owned:
            pool.free(owned.pop(rng.randrange(len(owned))))
        allocated = [block for blocks in owned for block in blocks]
        assert len(set(allocated)) == len(allocated)
        assert len(allocated) + pool.num_free == 16
        assert set(allocated) <= set(range(16))


def test_the_pool_refuses_too_many_blocks_and_double_frees() -> None:
    pool = BlockPool(2)
    blocks = pool.allocate(2)
    with pytest.raises(ValueError, match="1 blocks asked for, 0 free"):
        pool.allocate(1)
    pool.free(blocks)
    with pytest.raises(ValueError, match="freed twice"):
        pool.free(blocks[:1])


@settings(max_examples=150, deadline=None)
@given(
    lengths=st.lists(st.tuples(st.integers(1, 30), st.integers(1, 20)), min_size=1, max_size=12),
    num_blocks=st.integers(13, 40),
    budget=st.integers(1, 40),
    max_num_seqs=st.integers(1, 6),
    chunked=st.booleans(),
)
def test_every_sequence_finishes_within_the_limits(
    lengths: list[tuple[int, int]], num_blocks: int, budget: int, max_num_seqs: int, chunked: bool
) -> None:
    limits = SchedulerLimits(max_num_seqs, budget, chunked, block_size=4)
    pool = BlockPool(num_blocks)  # 13 blocks hold the longest sequence
    scheduler = Scheduler(pool, limits)
    for number, (prompt, output) in enumerate(lengths):
        scheduler.add(make_sequence(number, prompt, output))
    num_ended = 0
    while (batch := scheduler.schedule()) is not None:
        assert len(scheduler.running) <= max_num_seqs
        num_tokens = sum(chunk.num_tokens for chunk in batch.chunks)
        whole = not chunked and len(batch.chunks) == 1
        assert num_tokens <= budget or whole, "only a whole prompt alone may exceed the budget"
        scheduled = [chunk.sequence for chunk in batch.chunks]
        assert len(set(map(id, scheduled))) == len(scheduled)
        assert not {id(s) for s in batch.preempted} & {id(s) for s in scheduled}
        for chunk in batch.chunks:
            end = chunk.start + chunk.num_tokens
            assert len(chunk.sequence.block_table) * 4 >= end
        tables = [block for s in scheduler.running for block in s.block_table]
        assert len(set(tables)) == len(tables)
        num_ended += len(finish_step(scheduler, pool, batch))
    assert num_ended == len(lengths)
    assert pool.num_free == num_blocks


def test_the_youngest_is_preempted() -> None:
    pool = BlockPool(5)
    scheduler = Scheduler(pool, SchedulerLimits(8, 64, True, block_size=4))
    old, young = make_sequence(0, 7, 9), make_sequence(1, 7, 9)
    scheduler.add(old)
    scheduler.add(young)
    preempted: list[Sequence] = []
    while not preempted:
        batch = scheduler.schedule()
        assert batch is not None
        preempted += batch.preempted
        finish_step(scheduler, pool, batch)
    assert preempted == [young]
    assert scheduler.running == [old]
    assert young.block_table == []
    assert young.num_computed == 0


def test_decodes_go_on_beside_a_long_prompt() -> None:
    pool = BlockPool(64)
    scheduler = Scheduler(pool, SchedulerLimits(8, 8, True, block_size=4))
    short, long = make_sequence(0, 2, 50), make_sequence(1, 60, 2)
    scheduler.add(short)
    batch = scheduler.schedule()
    assert batch is not None
    finish_step(scheduler, pool, batch)
    scheduler.add(long)
    while long.num_output_tokens == 0:
        batch = scheduler.schedule()
        assert batch is not None
        assert batch.chunks[0].sequence is short
        assert batch.chunks[0].num_tokens == 1
        finish_step(scheduler, pool, batch)
    assert short.num_output_tokens == 1 + -(-60 // 7)


@dataclass
class Arriving:
    """A reservation, as the scheduler sees it."""

    request: Request
    blocks: list[int]
    number: int = 2


def test_a_reservation_leaves_the_blocks_that_running_sequences_may_need() -> None:
    pool = BlockPool(4)
    scheduler = Scheduler(pool, SchedulerLimits(8, 64, True, block_size=4))
    offered = make_sequence(1, 3, 1).request
    assert scheduler.can_reserve(offered, 4, []), "an offer may take the whole idle pool"
    scheduler.add(make_sequence(0, 4, 2))
    assert not scheduler.can_reserve(offered, 1, []), "waiting sequences come first"
    scheduler.schedule()
    assert scheduler.can_reserve(offered, 2, [])
    assert not scheduler.can_reserve(offered, 3, [])
    assert not scheduler.can_reserve(offered, 2, [Arriving(offered, [])])


def test_a_reservation_leaves_the_blocks_that_answers_are_expected_to_take() -> None:
    pool = BlockPool(8)
    scheduler = Scheduler(pool, SchedulerLimits(8, 64, True, block_size=4))
    scheduler.add(make_sequence(0, 4, 20))  # 6 blocks at its end
    scheduler.schedule()
    assert pool.num_free == 7
    assert scheduler.can_reserve(make_sequence(1, 4, 1).request, 2, [])
    assert not scheduler.can_reserve(make_sequence(1, 4, 12).request, 2, [])
    arriving = [Arriving(make_sequence(2, 4, 12).request, pool.allocate(1))]
    assert not scheduler.can_reserve(make_sequence(1, 4, 1).request, 2, arriving)


@pytest.mark.parametrize(("max_num_seqs", "num_ahead"), [(1, 1), (8, 1), (32, 4), (256, 32)])
def test_no_more_is_reserved_than_can_run_and_a_few_ahead(
    max_num_seqs: int, num_ahead: int
) -> None:
    scheduler = Scheduler(BlockPool(10_000), SchedulerLimits(max_num_seqs, 64, True, block_size=4))
    request = make_sequence(0, 3, 1).request
    reserved: list[Arriving] = []
    while scheduler.can_reserve(request, 1, reserved):
        reserved.append(Arriving(request, [0]))
    assert len(reserved) == max_num_seqs + num_ahead
