"""Replicas under every order of events: right tokens, one answer each, no block lost."""

from __future__ import annotations

import random

import pytest

from serve.request import Request
from tests.simulation import Cluster, random_request

SHAPES = [(0, 1), (0, 2), (1, 1), (2, 1), (1, 2), (2, 2), (3, 2)]


def storm(seed: int, shape: tuple[int, int], *, abort_rate: float, **options: object) -> Cluster:
    print(f"seed={seed} shape={shape} abort_rate={abort_rate} {options}")
    rng = random.Random(seed)
    cluster = Cluster(rng, *shape, **options)  # type: ignore[arg-type]
    requests: list[Request] = []

    def disturb() -> None:
        if len(requests) < 60 and rng.random() < 0.05:
            requests.append(random_request(rng, len(requests), max_total=60))
            cluster.submit(requests[-1])
        if requests and rng.random() < abort_rate:
            cluster.abort(rng.choice(requests).id)

    requests.append(random_request(rng, 0, max_total=60))
    cluster.submit(requests[0])
    while len(requests) < 60:
        cluster.run(disturb)
        requests.append(random_request(rng, len(requests), max_total=60))
        cluster.submit(requests[-1])
    cluster.run(disturb)
    cluster.check(requests)
    return cluster


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("seed", range(6))
def test_every_request_gets_the_models_tokens(shape: tuple[int, int], seed: int) -> None:
    storm(seed, shape, abort_rate=0.0)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("seed", range(6))
def test_aborts_at_any_moment_leak_nothing_and_disturb_nobody(
    shape: tuple[int, int], seed: int
) -> None:
    storm(seed, shape, abort_rate=0.01)


@pytest.mark.parametrize("shape", SHAPES)
def test_whole_prompts(shape: tuple[int, int]) -> None:
    storm(3, shape, abort_rate=0.005, chunked=False)


@pytest.mark.parametrize("shape", SHAPES)
def test_pools_that_hold_one_context_only(shape: tuple[int, int]) -> None:
    cluster = storm(5, shape, abort_rate=0.005, num_blocks=15)
    assert cluster.max_preemptions > 0


@pytest.mark.parametrize("shape", SHAPES)
def test_one_sequence_and_tiny_chunks(shape: tuple[int, int]) -> None:
    storm(7, shape, abort_rate=0.005, max_num_seqs=1, max_num_batched_tokens=3, max_push_blocks=1)
