"""Queue orders: which sequence is admitted first, and that a policy's registered order is used."""

from __future__ import annotations

import random

import pytest

from serve.protocol.messages import Prefill
from serve.replica.block_pool import BlockPool
from serve.replica.limits import SchedulerLimits
from serve.replica.queue_order import QUEUE_ORDERS, QueueOrder
from serve.replica.replica import Replica, ReplicaSettings
from serve.replica.scheduler import Scheduler
from serve.replica.sequence import Sequence
from serve.replica.token_ids import TokenIds
from serve.request import Request, SamplingParams, pack_ids

LENGTHS = (9, 3, 7, 1, 5)


def make_request(number: int, length: int) -> Request:
    sampling = SamplingParams(max_tokens=1)
    return Request(id=f"s{number}", prompt=pack_ids(range(length)), sampling=sampling)


def make_sequence(number: int, length: int = 4) -> Sequence:
    request = make_request(number, length)
    return Sequence(request, number, True, TokenIds(request.prompt))


BY_LENGTH = QueueOrder("the shortest first", lambda sequence: (sequence.num_prompt_tokens,))


def test_fcfs_takes_preempted_sequences_first_and_then_arrivals() -> None:
    scheduler = Scheduler(BlockPool(8), SchedulerLimits(8, 64, True, block_size=4))
    sequences = [make_sequence(number) for number in range(6)]
    for number in (3, 1):
        sequences[number].num_preemptions = 1
    for sequence in sequences:
        scheduler.add(sequence)
    assert [sequence.number for sequence in scheduler.waiting] == [1, 3, 0, 2, 4, 5]


@pytest.mark.parametrize("seed", range(5))
def test_any_order_admits_the_smallest_key_and_then_the_first_queued(seed: int) -> None:
    rng = random.Random(seed)
    limits = SchedulerLimits(1, 64, True, block_size=4)
    scheduler = Scheduler(BlockPool(64), limits, BY_LENGTH)
    sequences = [make_sequence(number, rng.randint(1, 5)) for number in range(30)]
    for sequence in sequences:
        scheduler.add(sequence)
    expected = sorted(sequences, key=lambda sequence: (sequence.num_prompt_tokens, sequence.number))
    assert list(scheduler.waiting) == expected
    batch = scheduler.schedule()
    assert batch is not None
    assert batch.admitted == (expected[0],)


@pytest.mark.parametrize(
    ("policy", "lengths"), [("fcfs", LENGTHS), ("shortest", tuple(sorted(LENGTHS)))]
)
def test_a_replica_uses_the_order_registered_under_its_policy(
    policy: str, lengths: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(QUEUE_ORDERS, "shortest", BY_LENGTH)
    limits = SchedulerLimits(1, 64, True, block_size=4)
    settings = ReplicaSettings(0, (0,), 16, limits, 2, (), schedule_policy=policy)
    replica = Replica(settings, None, lambda: 0.0)
    for number, length in enumerate(LENGTHS):
        replica.on_message(Prefill.of((make_request(number, length), 0)))
    admitted = []
    while (step := replica.next_step()) is not None:
        admitted += [len(sequence.token_ids) for sequence in step.sequences]
        replica.on_step([0])
    assert tuple(admitted) == lengths
