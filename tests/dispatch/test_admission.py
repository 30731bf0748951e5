"""Admission: limits in requests and tokens, a client's share of them, one message for a prompt."""

from __future__ import annotations

import random
import sys
from collections import Counter
from typing import Any

import pytest

from serve.dispatch.admission import Admission, QueueLimits, TooManyWaiting
from serve.dispatch.dispatcher import Dispatcher
from serve.protocol.messages import Abort, Prefill, decode, encode
from serve.request import Request, SamplingParams, pack_ids
from serve.topology import ReplicaInfo, Role
from tests.support.traced_memory import bytes_left_by


def make_requests(count: int, prompt: int = 1, name: str = "r", **sampling: Any) -> list[Request]:
    ids = pack_ids(range(prompt))
    return [
        Request(
            id=f"{name}{i}", prompt=ids, sampling=SamplingParams(max_tokens=4, seed=i, **sampling)
        )
        for i in range(count)
    ]


def fill(admission: Admission, client: str, count: int = 1, prompt: int = 1) -> int:
    """Add calls of ``count`` requests until one is refused. Return how many requests were added."""
    added = 0
    while True:
        requests = make_requests(count, prompt)
        try:
            admission.check(requests, client)
        except TooManyWaiting:
            return added
        for request in requests:
            admission.add(request, client)
        added += count


def refusal(admission: Admission, requests: list[Request], client: str = "a") -> str:
    with pytest.raises(TooManyWaiting) as caught:
        admission.check(requests, client)
    return str(caught.value)


def test_each_limit_is_named() -> None:
    admission = Admission(QueueLimits(4, 100, 1.0))
    for request in make_requests(2, prompt=40):
        admission.add(request, "a")
    assert "2 requests wait for their first token; --max-waiting allows 4" in refusal(
        admission, make_requests(3)
    )
    message = refusal(admission, make_requests(1, prompt=21))
    assert "--max-waiting-tokens allows 100" in message
    assert "80 tokens wait" in message
    admission.check(make_requests(1, prompt=20), "a")
    fair = Admission(QueueLimits(10, 1000, 0.5))
    for request in make_requests(5):
        fair.add(request, "a")
    assert "5 requests of this client wait" in refusal(fair, make_requests(1))
    assert "--max-waiting-share 0.5" in refusal(fair, make_requests(1))
    fair.check(make_requests(1), "b")


def test_one_prompt_of_any_length_fits_when_nothing_waits() -> None:
    admission = Admission(QueueLimits(4, 100, 0.9))
    (long,) = make_requests(1, prompt=5000)
    admission.check([long], "a")
    admission.add(long, "a")
    assert "--max-waiting-tokens" in refusal(admission, make_requests(1), "b")
    admission.remove(long, "a")
    admission.check([long], "b")
    assert (admission.num_requests, admission.num_tokens) == (0, 0)


@pytest.mark.parametrize("count", [1, 8, 128])
def test_a_client_that_is_alone_gets_its_share_and_leaves_room_for_others(count: int) -> None:
    admission = Admission(QueueLimits(4096, 1 << 23, 0.9))
    added = fill(admission, "greedy", count)
    assert added in range(int(4096 * 0.9) - count, int(4096 * 0.9) + 1)
    admission.check(make_requests(128), "other")
    for number in range(50):
        (request,) = make_requests(1)
        admission.check([request], f"newcomer {number}")
        admission.add(request, f"newcomer {number}")


def test_long_prompts_are_shared_out_by_tokens() -> None:
    admission = Admission(QueueLimits(4096, 100_000, 0.9))
    assert fill(admission, "greedy", prompt=1000) == 90
    assert fill(admission, "other", prompt=1000) in range(8, 11)


@pytest.mark.parametrize("max_requests", range(1, 9))
def test_small_queues(max_requests: int) -> None:
    admission = Admission(QueueLimits(max_requests, 1000, 0.9))
    admission.check(make_requests(max_requests), "a")  # a call may take all while nothing waits
    # One by one, the last place is kept for others.
    assert fill(admission, "a") == max(1, max_requests - 1)
    assert fill(admission, "b") == (max_requests > 1)


def test_without_a_share_one_client_may_have_all() -> None:
    assert fill(Admission(QueueLimits(100, 1 << 20)), "a", 10) == 100
    offline = Admission(QueueLimits(sys.maxsize, sys.maxsize))
    requests = make_requests(1000, prompt=100)
    for _ in range(5):
        offline.check(requests, "")
        for request in requests:
            offline.add(request, "")


@pytest.mark.parametrize("seed", range(10))
def test_greedy_clients_get_equal_parts_and_counts_return_to_zero(seed: int) -> None:
    print(f"seed={seed}")
    rng = random.Random(seed)
    admission = Admission(QueueLimits(300, 1 << 20, 0.9))
    held: list[tuple[str, Request]] = []
    for _ in range(6000):
        client = rng.choice("abc")
        (request,) = make_requests(1)
        try:
            admission.check([request], client)
        except TooManyWaiting:
            held.sort(key=lambda _: rng.random())
            admission.remove(held[-1][1], held.pop()[0])
            continue
        admission.add(request, client)
        held.append((client, request))
    counts = Counter(client for client, _ in held)
    assert len(held) <= 300 - 5
    assert max(counts.values()) - min(counts.values()) < 30
    for client, request in held:
        admission.remove(request, client)
    assert (admission.num_requests, admission.num_tokens) == (0, 0)
    assert not admission._clients, "no client is remembered"


# --- messages -----------------------------------------------------------------------------------


def make_dispatcher(num_prefill: int = 1, policy: str = "round-robin") -> Dispatcher:
    infos = [ReplicaInfo(i, Role.PREFILL, (i,), 1, 1) for i in range(num_prefill)]
    infos += [ReplicaInfo(num_prefill + i, Role.DECODE, (num_prefill + i,), 1, 1) for i in range(2)]
    return Dispatcher(infos, policy, QueueLimits(1000, 1 << 24), lambda: 0.0)


@pytest.mark.parametrize("num_prefill", [1, 2, 3])
def test_a_prompt_travels_once_to_each_prefill_replica(num_prefill: int) -> None:
    dispatcher = make_dispatcher(num_prefill)
    requests = make_requests(12, prompt=7)
    outgoing = dispatcher.dispatch(requests)
    assert [out.rank for out in outgoing] == list(range(num_prefill))
    arrived: dict[str, Request] = {}
    for out in outgoing:
        message = decode(encode(out.message))
        assert isinstance(message, Prefill)
        assert message.prompt == requests[0].prompt
        for request, decode_replica in message.requests:
            arrived[request.id] = request
            assert decode_replica in (num_prefill, num_prefill + 1)
            assert request.prompt is message.prompt
    assert arrived == {request.id: request for request in requests}


def test_requests_that_differ_travel_apart() -> None:
    first, second = make_requests(2, prompt=3)
    other_prompt = make_requests(1, prompt=4, name="p")
    other_sampling = make_requests(1, prompt=3, name="s", top_k=5)
    outgoing = make_dispatcher().dispatch([first, second, *other_prompt, *other_sampling])
    messages = [out.message for out in outgoing]
    assert all(isinstance(message, Prefill) for message in messages)
    sizes = [len(message.choices) for message in messages if isinstance(message, Prefill)]
    assert sizes == [2, 1, 1]


def test_a_choice_is_aborted_alone() -> None:
    dispatcher = make_dispatcher()
    dispatcher.dispatch(make_requests(3))
    assert [out.message for out in dispatcher.close("r1")] == [Abort("r1")] * 2
    assert (dispatcher.num_active, dispatcher.num_waiting) == (2, 2)


def bytes_waiting(num_tokens: int, n: int) -> int:
    """Return the bytes that rank 0 holds for a waiting prompt of ``n`` choices."""
    dispatcher = make_dispatcher()
    return bytes_left_by(lambda: dispatcher.dispatch(make_requests(n, num_tokens)))


def test_a_waiting_prompt_takes_four_bytes_a_token_for_any_number_of_choices() -> None:
    long = 100_000
    assert bytes_waiting(long, 1) < 8 * long
    assert (bytes_waiting(long, 101) - bytes_waiting(long, 1)) / 100 < 2048
