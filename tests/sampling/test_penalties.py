"""Penalties from incremental counts, compared with counting all tokens anew."""

from __future__ import annotations

import random

import pytest
import torch

from serve.protocol.plan import SampleRow
from serve.sampling import penalties
from serve.sampling.slots import SamplingSlots
from tests.support.penalised_requests import random_case, steps

VOCAB = 50
CPU = torch.device("cpu")


@pytest.fixture
def rng() -> random.Random:
    seed = random.randrange(2**32)
    print("seed", seed)
    torch.manual_seed(seed)
    return random.Random(seed)


@pytest.mark.parametrize("max_num_rows", [1, 2, 7, 30])
def test_requests_that_come_and_go_and_pause(max_num_rows: int, rng: random.Random) -> None:
    """There are more requests than slots, and the host may not know the newest token."""
    for changed, expected in steps(rng, SamplingSlots(max_num_rows, CPU), max_num_rows, VOCAB, CPU):
        assert torch.allclose(changed.double(), expected, atol=1e-4)


@pytest.mark.parametrize("max_num_ids", [1, 60, 200])
def test_long_histories_are_counted_in_parts(
    max_num_ids: int, rng: random.Random, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Some histories are longer than one part."""
    monkeypatch.setattr(penalties, "_MAX_IDS", max_num_ids)
    for changed, expected in steps(rng, SamplingSlots(9, CPU), 9, VOCAB, CPU):
        assert torch.allclose(changed.double(), expected, atol=1e-4)


def test_a_step_does_not_count_the_history_again(
    rng: random.Random, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A request that is sampled in every step is counted once."""
    counted: list[int] = []
    count = penalties._count

    def note(rows: dict[int, SampleRow], counts: torch.Tensor) -> None:
        counted.extend(rows)
        count(rows, counts)

    monkeypatch.setattr(penalties, "_count", note)
    slots = SamplingSlots(8, CPU)
    cases = [random_case(rng, number, VOCAB) for number in range(8)]
    cases = [case for case in cases if case.request.sampling.has_penalties]
    for _ in range(20):
        newest = torch.tensor([case.token_ids[-1] for case in cases])
        placed = slots.place([case.row(rng) for case in cases])
        slots.adjust(torch.zeros(len(cases), VOCAB), placed, newest)
        for case in cases:
            case.token_ids.append(rng.randrange(VOCAB))
    assert len(counted) == len(cases)
