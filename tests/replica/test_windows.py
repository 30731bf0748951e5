"""Sliding windows: out-of-window blocks are freed, and no block that is read is."""

from __future__ import annotations

import random
from collections import deque

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from serve.protocol.messages import AnyMessage, Offer, Push
from serve.replica.block_pool import BlockPool
from serve.replica.growth import OutputLengths
from serve.replica.limits import SchedulerLimits
from serve.replica.scheduler import Batch, Chunk, Scheduler
from serve.replica.sequence import OUT_OF_WINDOW_BLOCK, Sequence
from serve.replica.token_ids import TokenIds
from serve.request import Request, SamplingParams, pack_ids
from tests.support.simulation import Cluster, storm

BLOCK_SIZE = 4
SHAPES = [(0, 1), (0, 2), (1, 1), (2, 2), (3, 2)]


def make_limits(
    window: int | None, *, budget: int = 24, chunked: bool = True, max_num_seqs: int = 8
) -> SchedulerLimits:
    return SchedulerLimits(max_num_seqs, budget, chunked, BLOCK_SIZE, window)


def make_request(prompt: int, output: int, number: int = 0) -> Request:
    sampling = SamplingParams(max_tokens=output, ignore_eos=True)
    return Request(id=f"s{number}", prompt=pack_ids(range(prompt)), sampling=sampling)


def make_sequence(prompt: int, output: int, number: int = 0) -> Sequence:
    request = make_request(prompt, output, number)
    return Sequence(request, number, True, TokenIds(request.prompt))


# --- which blocks -----------------------------------------------------------------------------


@pytest.mark.parametrize("block_size", [1, 3, 4, 16])
@pytest.mark.parametrize("window", [1, 2, 3, 4, 5, 8, 17, 64])
def test_out_of_window_blocks_are_those_that_no_token_reads(window: int, block_size: int) -> None:
    limits = SchedulerLimits(8, 24, True, block_size, window)
    kept = max(window, 2)  # so that a prompt always has a block to send
    for position in range(70):
        unread = [p for p in range(position) if p <= position - kept]
        whole = sum((p + 1) % block_size == 0 for p in unread)
        assert limits.num_out_of_window_blocks(position) == whole
        assert position == 0 or whole < -(-position // block_size)


def test_no_block_is_out_of_window_if_a_layer_has_no_window() -> None:
    assert make_limits(None).num_out_of_window_blocks(10_000) == 0


def test_a_sequence_drops_a_block_once() -> None:
    sequence = make_sequence(10, 1)
    sequence.block_table = [5, 0, 7]
    assert sequence.drop_out_of_window_blocks(1) == [5]
    assert sequence.drop_out_of_window_blocks(1) == []
    assert sequence.drop_out_of_window_blocks(2) == [0], "block 0 may also be a real block"
    assert sequence.drop_out_of_window_blocks(1) == []
    assert sequence.num_out_of_window_blocks == 2
    assert sequence.block_table == [OUT_OF_WINDOW_BLOCK, OUT_OF_WINDOW_BLOCK, 7]
    assert sequence.owned_blocks == [7]
    with pytest.raises(ValueError, match="cannot drop 4 of 3 blocks"):
        sequence.drop_out_of_window_blocks(4)
    assert sequence.take_blocks() == [7]
    assert sequence.block_table == []
    assert sequence.num_out_of_window_blocks == 0
    assert sequence.take_blocks() == []


# --- the scheduler ----------------------------------------------------------------------------


class Steps:
    """A scheduler with up to two steps in flight, checked after every event."""

    def __init__(self, num_blocks: int, limits: SchedulerLimits) -> None:
        self.pool = BlockPool(num_blocks)
        self.scheduler = Scheduler(self.pool, limits)
        self.limits = limits
        self.in_flight: deque[Batch] = deque()
        self.num_ended = 0
        self.preempted: list[Sequence] = []

    def plan(self) -> bool:
        if len(self.in_flight) == 2 or (batch := self.scheduler.schedule()) is None:
            return False
        self.in_flight.append(batch)
        self.preempted += batch.preempted
        self.check()
        return True

    def finish(self) -> bool:
        if not self.in_flight:
            return False
        batch = self.in_flight.popleft()
        self.scheduler.update(batch)
        for chunk in batch.chunks:
            self._take_token(chunk)
        self.check()
        return True

    def _take_token(self, chunk: Chunk) -> None:
        sequence = chunk.sequence
        if not chunk.sample or not self.scheduler.holds(sequence):
            return
        sequence.token_ids.append(0)
        if sequence.num_output_tokens == sequence.request.sampling.max_tokens:
            self.scheduler.remove(sequence)
            self.pool.free(sequence.take_blocks())
            self.num_ended += 1

    def check(self) -> None:
        """Check that every block has one owner and that steps in flight read owned blocks."""
        owned = [block for s in self.scheduler.running for block in s.owned_blocks]
        assert len(set(owned)) == len(owned)
        assert len(owned) + self.pool.num_free == self.pool.num_blocks
        for sequence in self.scheduler.running:
            dropped = sequence.block_table[: sequence.num_out_of_window_blocks]
            assert dropped == [OUT_OF_WINDOW_BLOCK] * len(dropped)
        for batch in self.in_flight:
            for chunk in batch.chunks:
                self._check_reads(chunk)

    def _check_reads(self, chunk: Chunk) -> None:
        sequence, window = chunk.sequence, self.limits.window
        if sequence not in self.scheduler.running:
            return
        if chunk.num_preemptions != sequence.num_preemptions or window is None:
            return
        first_read = max(0, chunk.start - window + 1)
        assert sequence.num_out_of_window_blocks <= first_read // BLOCK_SIZE
        end = chunk.start + chunk.num_tokens
        assert len(sequence.block_table) * BLOCK_SIZE >= end


@settings(max_examples=200, deadline=None)
@given(
    lengths=st.lists(st.tuples(st.integers(1, 30), st.integers(1, 20)), min_size=1, max_size=10),
    num_blocks=st.integers(13, 40),  # 13 hold the longest sequence
    window=st.integers(1, 40),
    budget=st.integers(1, 40),
    max_num_seqs=st.integers(1, 6),
    chunked=st.booleans(),
    rng=st.randoms(use_true_random=False),
)
def test_every_sequence_finishes_and_every_block_is_freed(
    lengths: list[tuple[int, int]],
    num_blocks: int,
    window: int,
    budget: int,
    max_num_seqs: int,
    chunked: bool,
    rng: random.Random,
) -> None:
    limits = make_limits(window, budget=budget, chunked=chunked, max_num_seqs=max_num_seqs)
    steps = Steps(num_blocks, limits)
    for number, (prompt, output) in enumerate(lengths):
        steps.scheduler.add(make_sequence(prompt, output, number))
    events = [steps.plan, steps.finish]
    while True:
        rng.shuffle(events)
        if not any(event() for event in events):
            break
    assert steps.num_ended == len(lengths)
    assert steps.pool.num_free == num_blocks


def test_a_long_answer_needs_no_more_blocks_than_its_window() -> None:
    steps = Steps(5, make_limits(8))
    sequence = make_sequence(6, 200)
    steps.scheduler.add(sequence)
    most = 0
    while steps.plan() or steps.finish():
        most = max(most, len(sequence.owned_blocks))
    assert steps.num_ended == 1
    assert not steps.preempted
    # Seven positions before the token, and two tokens in flight.
    assert most <= 2 + -(-(7 + 2) // BLOCK_SIZE) - 1
    assert steps.pool.num_free == 5


def test_a_prompt_is_admitted_whole_and_frees_blocks_chunk_by_chunk() -> None:
    steps = Steps(8, make_limits(8, budget=8))
    sequence = make_sequence(30, 2)
    steps.scheduler.add(sequence)
    owned = []
    while steps.num_ended == 0:
        steps.plan()
        owned.append(len(sequence.owned_blocks))
        steps.finish()
    # Of 0, 8, 16, 24 and 30 computed tokens, the last 7 are still read.
    assert owned == [8, 8, 6, 4, 3]


def test_a_preempted_sequence_begins_with_all_its_blocks_again() -> None:
    steps = Steps(9, make_limits(16))
    old, young = make_sequence(12, 20, 0), make_sequence(24, 8, 1)
    young.token_ids.append(0)
    young.num_computed = young.num_scheduled = 24
    young.block_table = [OUT_OF_WINDOW_BLOCK, OUT_OF_WINDOW_BLOCK, *steps.pool.allocate(5)]
    young.num_out_of_window_blocks = 2
    steps.scheduler.add(old)
    steps.scheduler.add_received(young)
    num_dropped = []
    while not steps.preempted:
        num_dropped.append(young.num_out_of_window_blocks)
        assert steps.plan()
        steps.finish()
    assert steps.preempted == [young]
    assert num_dropped[-1] == 3
    assert young.block_table == []
    assert young.num_out_of_window_blocks == 0
    while young.num_scheduled == 0:
        assert steps.plan() or steps.finish()
    assert young.num_out_of_window_blocks == 0
    assert len(young.owned_blocks) == 8
    while steps.plan() or steps.finish():
        pass
    assert steps.num_ended == 2
    assert steps.pool.num_free == 9


# --- clusters ---------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("window", [1, 2, 4, 7, 16, 59, 1000])
def test_every_request_gets_the_models_tokens(shape: tuple[int, int], window: int) -> None:
    storm(window, shape, abort_rate=0.0, window=window, max_num_batched_tokens=11)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("seed", range(4))
def test_aborts_at_any_moment_leak_nothing(shape: tuple[int, int], seed: int) -> None:
    window = random.Random(seed).randint(2, 20)
    storm(seed, shape, abort_rate=0.01, window=window, max_num_batched_tokens=9)


@pytest.mark.parametrize("shape", SHAPES)
def test_whole_prompts(shape: tuple[int, int]) -> None:
    storm(3, shape, abort_rate=0.005, window=9, chunked=False)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("window", [6, 33])
def test_pools_that_hold_one_context_only(shape: tuple[int, int], window: int) -> None:
    storm(5, shape, abort_rate=0.005, window=window, num_blocks=15, max_push_blocks=1)


def test_preemption_happens_in_a_tight_windowed_pool(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(OutputLengths, "expect", lambda self, num_tokens, *others: num_tokens)
    cluster = storm(5, (1, 1), abort_rate=0.0, window=33, num_blocks=15)
    assert cluster.max_preemptions > 0


class RecordingCluster(Cluster):
    """Records every message."""

    def watch(self) -> list[AnyMessage]:
        self.seen: list[AnyMessage] = []
        return self.seen

    def _post(self, source: int, target: int, message: AnyMessage) -> None:
        self.seen.append(message)
        super()._post(source, target, message)


@pytest.mark.parametrize("prompt", [1, 3, 4, 5, 29, 32, 33])
@pytest.mark.parametrize("window", [1, 2, 4, 5, 9, 31, 100, None])
def test_blocks_out_of_the_first_decoded_tokens_window_are_not_sent(
    prompt: int, window: int | None
) -> None:
    cluster = RecordingCluster(random.Random(prompt), 1, 1, window=window, max_num_batched_tokens=8)
    seen = cluster.watch()
    request = make_request(prompt, 12)
    num_free: list[int] = []

    def note_free() -> None:
        if cluster.nodes[1].replica._incoming.num_reserved:
            num_free.append(cluster.nodes[1].pool.num_free)

    cluster.submit(request)
    cluster.run(note_free)
    cluster.check([request])
    assert sum(isinstance(message, Offer) for message in seen) == 1
    pushes = [message for message in seen if isinstance(message, Push)]
    reach = prompt if window is None else max(window, 2) - 1
    first = max(0, prompt - reach) // BLOCK_SIZE
    pushed = [push.first_block + i for push in pushes for i in range(push.num_blocks)]
    assert pushed == list(range(first, -(-prompt // BLOCK_SIZE)))
    assert pushes[-1].handover is not None
    reserved = (prompt + BLOCK_SIZE) // BLOCK_SIZE - first
    assert set(num_free) == {cluster.nodes[1].num_blocks - reserved}
