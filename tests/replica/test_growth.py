"""Expected growth: quantiles of seen lengths, the peak over time, and what a decode pool takes."""

from __future__ import annotations

import random

import pytest

from serve.replica.growth import FIRST_GUESS, MIN_LENGTHS, Growth, OutputLengths, peak_blocks
from serve.request import Request, SamplingParams, pack_ids
from tests.support.lockstep import Lockstep


def seen(*lengths: int, window: int = 1024) -> OutputLengths:
    answers = OutputLengths(window)
    for length in lengths:
        answers.observe(length)
    return answers


def test_the_first_guess_holds_until_enough_answers_are_seen() -> None:
    few = seen(*[3] * (MIN_LENGTHS - 1))
    assert few.expect(0, 10_000) == FIRST_GUESS
    assert few.expect(0, 7) == 7
    assert few.expect(1000, 10_000) == 1500
    assert seen(*[3] * MIN_LENGTHS).expect(0, 10_000) == 3


def test_an_answer_is_expected_to_be_like_those_that_are_longer() -> None:
    answers = seen(*range(1, 101))
    assert answers.expect(0, 1000) == 100
    assert answers.expect(0, 1000, number=1) == 51
    assert answers.expect(50, 1000, number=1) == 76
    assert answers.expect(50, 70, number=1) == 70
    assert answers.expect(99, 1000) == 100
    assert answers.expect(100, 1000) == 150, "none was longer"
    assert answers.expect(100, 120) == 120


def test_sequences_are_expected_to_end_at_different_times() -> None:
    answers = seen(*range(1, 101))
    expected = [answers.expect(0, 1000, number) for number in range(40, 120)]
    assert min(expected) in range(20, 24)
    assert max(expected) in range(98, 101)
    assert sum(expected) / len(expected) == pytest.approx(60, abs=1)


def test_only_the_last_answers_count() -> None:
    answers = seen(*[1000] * 50, *[5] * 40, window=40)
    assert answers.expect(0, 9999) == 5


@pytest.mark.parametrize("seed", range(20))
def test_the_peak_is_that_of_a_step_by_step_count(seed: int) -> None:
    rng = random.Random(seed)
    growths = [Growth(n := rng.randint(0, 30), rng.randint(1, 50), n) for _ in range(12)]
    print(f"seed={seed} {growths}")
    most = 0.0
    for step in range(31):
        active = [growth for growth in growths if growth.num_steps >= step]
        held = sum(growth.num_tokens + step for growth in active)
        most = max(most, held / 4 + len(active) / 2)
    assert peak_blocks(growths, 4) == most


def test_a_window_bounds_what_a_sequence_takes() -> None:
    assert peak_blocks([Growth(1000, 8, 4)], 4) == 3.5
    assert peak_blocks([], 4) == 0


def make_requests(count: int, prompt: int, max_tokens: int) -> list[Request]:
    sampling = SamplingParams(max_tokens=max_tokens, ignore_eos=True)
    prompt_ids = pack_ids(range(prompt))
    return [Request(id=f"r{i}", prompt=prompt_ids, sampling=sampling) for i in range(count)]


@pytest.mark.parametrize("max_tokens", [500, 8000])
def test_a_pool_that_holds_the_prompts_but_not_their_answers_computes_no_prompt_twice(
    max_tokens: int,
) -> None:
    """Prompts of 32,000 tokens fit into 33,600. With their answers they need 64,000.

    Taking every prompt that fits computed 21,064 tokens again and took 1,013 steps; it is 1,014
    where answers end before max_tokens.
    """
    ends = {f"r{i}": 500 for i in range(64)} if max_tokens > 500 else {}
    cluster = Lockstep((4000, 2100), lengths=ends)
    requests = make_requests(64, 500, max_tokens)
    if ends:
        requests = [
            Request(id=r.id, prompt=r.prompt, sampling=SamplingParams(max_tokens=max_tokens))
            for r in requests
        ]
    cluster.submit(requests)
    cluster.run()
    assert cluster.finished == {request.id: 1 for request in requests}
    assert cluster.decode.num_recomputed < 1000
    assert cluster.decode.num_steps <= 1013
    for node, num_blocks in zip(cluster.nodes, (4000, 2100), strict=True):
        assert node.load.num_free_blocks == num_blocks


def test_a_batch_may_trade_preemptions_for_steps() -> None:
    """Prompts that begin together grow together, so a careful pool is half empty in the mean."""
    found = {}
    for overcommit in (1.0, 8.0):
        ends = {f"r{i}": 400 for i in range(160)}
        cluster = Lockstep((4000, 1100), lengths=ends, overcommit=overcommit)
        requests = make_requests(160, 100, 2000)
        sampling = SamplingParams(max_tokens=2000)
        cluster.submit(Request(id=r.id, prompt=r.prompt, sampling=sampling) for r in requests)
        cluster.run()
        assert sum(cluster.finished.values()) == 160
        found[overcommit] = (cluster.decode.num_steps, cluster.decode.num_recomputed)
    assert found[1.0] == (2014, 0)
    assert found[8.0][0] < 0.7 * found[1.0][0]
    assert 0 < found[8.0][1] < 2.5 * 160 * 100


def test_finished_prompts_wait_on_the_prefill_side() -> None:
    cluster = Lockstep((4000, 4000), max_num_seqs=8)
    cluster.submit(make_requests(40, 100, 50))
    most = 0
    while cluster.tick():
        load = cluster.decode.load
        most = max(most, load.num_running + load.num_waiting)
    assert most <= 8 + 1
    assert cluster.decode.num_recomputed == 0
    assert sum(cluster.finished.values()) == 40


def test_an_offer_as_large_as_the_pool_is_taken_when_nothing_else_is_there() -> None:
    cluster = Lockstep((4000, 40))
    long, short = make_requests(2, 600, 39), make_requests(3, 20, 600)
    requests = [Request(id=f"s{r.id}", prompt=r.prompt, sampling=r.sampling) for r in short]
    cluster.submit([*requests[:2], *long, requests[2]])
    cluster.run()
    assert sum(cluster.finished.values()) == 5
    assert cluster.decode.load.num_free_blocks == 40
