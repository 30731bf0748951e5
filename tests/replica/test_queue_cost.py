"""The work of one event does not grow with the prompts that wait, and waiting prompts are small."""

from __future__ import annotations

import sys
from collections.abc import Callable

import pytest

from serve.protocol.messages import Abort, Offer, Prefill, decode, encode
from serve.replica.limits import SchedulerLimits
from serve.replica.replica import Replica, ReplicaSettings
from serve.request import Request, SamplingParams, pack_ids
from tests.support.traced_memory import bytes_left_by

LIMITS = SchedulerLimits(8, 64, True, block_size=16)


def make_replica(num_blocks: int = 64) -> Replica:
    """Make replica 0, which leads itself and offers prompts to replica 1."""
    return Replica(ReplicaSettings(0, (1, 2), num_blocks, LIMITS, 8, ()), None, lambda: 0.0)


def make_request(number: int, prompt: bytes = pack_ids(range(20))) -> Request:
    return Request(id=f"r{number}", prompt=prompt, sampling=SamplingParams(max_tokens=4))


def count_calls(event: Callable[[], object]) -> int:
    """Return how many Python functions, C functions and lines ``event`` runs."""
    count = 0

    def on_call(frame: object, kind: str, argument: object) -> None:
        nonlocal count
        count += 1

    sys.setprofile(on_call)
    try:
        event()
    finally:
        sys.setprofile(None)
    return count


def work_of_events(num_queued: int, decode_replica: int) -> dict[str, int]:
    """Count the calls of each kind of event on a replica with ``num_queued`` prompts."""
    replica = make_replica()
    for number in range(num_queued):
        replica.on_message(Prefill.of((make_request(number), decode_replica)))
    steps = 0

    def step() -> None:
        nonlocal steps
        planned = replica.next_step()
        assert planned is not None
        replica.on_step([1] * len(planned.rows))

    for _ in range(4):
        step()
    new = make_request(num_queued)
    middle = f"r{num_queued // 2}"
    return {
        "add": count_calls(lambda: replica.on_message(Prefill.of((new, decode_replica)))),
        "step": count_calls(step),
        "abort": count_calls(lambda: replica.on_message(Abort(middle))),
        "heartbeat": count_calls(replica.heartbeat),
    }


def work_of_offers(num_queued: int) -> dict[str, int]:
    replica = make_replica()
    for number in range(num_queued):
        replica.on_message(Offer(1, make_request(number)))
    return {
        "offer": count_calls(lambda: replica.on_message(Offer(1, make_request(num_queued)))),
        "abort": count_calls(lambda: replica.on_message(Abort(f"r{num_queued // 2}"))),
        "heartbeat": count_calls(replica.heartbeat),
    }


@pytest.mark.parametrize("decode_replica", [0, 1])
def test_a_long_queue_of_prompts_costs_no_more_calls(decode_replica: int) -> None:
    short, long = work_of_events(100, decode_replica), work_of_events(4000, decode_replica)
    # A heap's comparisons are calls: a few for each doubling of its length.
    assert all(long[event] <= short[event] + 40 for event in short), (short, long)


def test_a_long_queue_of_offers_costs_no_more_calls() -> None:
    assert work_of_offers(100) == work_of_offers(4000)


def bytes_waiting(num_tokens: int, n: int) -> int:
    """Return the bytes that a replica holds for a waiting prompt of ``n`` choices."""
    prompt = pack_ids(range(num_tokens))
    requests = [
        (Request(id=f"{i}", prompt=prompt, sampling=SamplingParams(max_tokens=4, seed=i)), 0)
        for i in range(n)
    ]
    data = encode(Prefill.of(*requests))
    replica = make_replica()
    return bytes_left_by(lambda: replica.on_message(decode(data)))


def test_a_waiting_prompt_takes_four_bytes_a_token_for_any_number_of_choices() -> None:
    long = 100_000
    assert bytes_waiting(long, 1) < 8 * long
    per_choice = (bytes_waiting(long, 101) - bytes_waiting(long, 1)) / 100
    assert per_choice < 4096
    assert bytes_waiting(2 * long, 1) - bytes_waiting(long, 1) == pytest.approx(4 * long, rel=0.01)
