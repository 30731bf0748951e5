"""A replica notices what should move and does not; a failure about one request ends it alone."""

from __future__ import annotations

import random
from typing import Any

import pytest

from serve.protocol.messages import Offer, Prefill, PushReceived
from serve.replica.output_processor import OutputProcessor
from serve.replica.replica import Replica
from serve.request import FinishReason, Request, SamplingParams, pack_ids
from tests.support.simulation import Cluster, random_request


def make_request(id: str, length: int, max_tokens: int = 4) -> Request:
    sampling = SamplingParams(max_tokens=max_tokens, ignore_eos=True)
    return Request(id=id, prompt=pack_ids(range(length)), sampling=sampling)


def texts(replica: Replica) -> list[str]:
    return [stall.what for stall in replica.stalls()]


def test_a_lost_acknowledgement_is_noticed() -> None:
    cluster = Cluster(random.Random(1), 1, 1)
    lost: list[PushReceived] = []

    def lose_one() -> None:
        channel = cluster.channels.get((2, 1), ())
        for message in [m for m in channel if isinstance(m, PushReceived)][: 1 - len(lost)]:
            cluster.channels[2, 1].remove(message)
            lost.append(message)

    cluster.submit(make_request("a", 8))
    cluster.run(lose_one)
    sender, receiver = (node.replica for node in cluster.nodes)
    what = f"push {lost[0].number} to replica 1, which is not acknowledged"
    (first,) = sender.stalls()
    (second,) = sender.stalls()
    assert first.what == second.what == what
    assert first.age_s == 0
    assert second.age_s > 0
    assert second.peers == (2,)  # the leader of the replica that should answer
    assert texts(receiver) == []
    sender.restart_clocks()
    clock_s = cluster.clock
    assert sender.stalls()[0].age_s <= cluster.clock - clock_s


def test_an_offer_that_fits_and_is_not_answered_is_noticed() -> None:
    cluster = Cluster(random.Random(1), 1, 1)
    decode = cluster.nodes[1].replica
    decode._incoming.on_offer(Offer(0, make_request("a", 8)))  # without the event that answers it
    assert texts(decode) == ["the offer of request a, whose blocks fit"]
    decode.on_message(Offer(0, make_request("b", 8)))
    assert texts(decode) == []


def test_prompts_that_nothing_starts_are_noticed() -> None:
    cluster = Cluster(random.Random(1), 0, 1)
    replica = cluster.nodes[0].replica
    replica.on_message(Prefill.of((make_request("a", 8), 0)))
    assert texts(replica) == ["prompts that wait although nothing runs"]
    assert replica.next_step() is not None
    assert texts(replica) == []


@pytest.mark.parametrize("seed", range(3))
def test_waiting_for_room_is_no_standstill(seed: int) -> None:
    """Whatever is found while a crowded cluster works is gone when it has worked on."""
    print(f"seed={seed}")
    rng = random.Random(seed)
    cluster = Cluster(rng, 2, 1, num_blocks=15)
    oldest = 0.0

    def look() -> None:
        nonlocal oldest
        if rng.random() < 0.1:
            for node in cluster.nodes:
                for stall in node.replica.stalls():
                    if not stall.what.startswith("push"):  # its time is that of the transfer
                        oldest = max(oldest, stall.age_s)
                        print(stall)

    requests = [random_request(rng, number, max_total=60) for number in range(40)]
    for request in requests:
        cluster.submit(request)
    cluster.run(look)
    cluster.check(requests)
    assert oldest == 0.0
    assert [texts(node.replica) for node in cluster.nodes] == [[], [], []]


@pytest.mark.parametrize("shape", [(0, 1), (1, 1), (2, 2)])
@pytest.mark.parametrize("method", ["start", "resume", "process"])
def test_text_that_fails_ends_its_request_alone(
    shape: tuple[int, int], method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    working = getattr(OutputProcessor, method)

    def fail_for_some(processor: OutputProcessor, subject: Any, *args: Any) -> Any:
        sequence = getattr(subject, "sequence", subject)
        if int(sequence.id[1:]) % 5 == 0 and (method != "process" or len(sequence.output_ids) > 1):
            raise RuntimeError("a tokenizer that fails")
        return working(processor, subject, *args)

    monkeypatch.setattr(OutputProcessor, method, fail_for_some)
    cluster = Cluster(random.Random(2), *shape)
    requests = [make_request(f"r{number}", 5 + number % 7, max_tokens=6) for number in range(20)]
    for request in requests:
        cluster.submit(request)
    cluster.run()
    failing = (
        {f"r{number}" for number in range(0, 20, 5)}
        if shape != (0, 1) or method != ("resume")
        else set()
    )
    failed = {id for id, endings in cluster.endings.items() if endings == [FinishReason.ERROR]}
    assert failed == failing
    cluster.check(request for request in requests if request.id not in failing)
