"""Replicas under every order of events: right tokens, one answer each, no block lost."""

from __future__ import annotations

import pytest

from serve.replica.growth import OutputLengths
from tests.support.simulation import storm

SHAPES = [(0, 1), (0, 2), (1, 1), (2, 1), (1, 2), (2, 2), (3, 2)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("seed", range(6))
def test_every_request_gets_the_tokens_of_the_model(shape: tuple[int, int], seed: int) -> None:
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
    storm(5, shape, abort_rate=0.005, num_blocks=15)


@pytest.mark.parametrize("shape", SHAPES)
def test_answers_that_outgrow_what_is_expected(
    shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(OutputLengths, "expect", lambda self, num_tokens, *others: num_tokens)
    cluster = storm(5, shape, abort_rate=0.005, num_blocks=15)
    assert cluster.max_preemptions > 0


@pytest.mark.parametrize("shape", SHAPES)
def test_one_sequence_and_tiny_chunks(shape: tuple[int, int]) -> None:
    storm(7, shape, abort_rate=0.005, max_num_seqs=1, max_num_batched_tokens=3, max_push_blocks=1)
