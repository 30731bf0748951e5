"""Sampling against plain float64 references: filters, penalties, independence of the batch."""

from __future__ import annotations

import itertools
import math
import random
from typing import Any

import pytest
import torch
from torch import Tensor

from serve.protocol.plan import SampleRow
from serve.request import Request, SamplingParams, pack_ids
from serve.sampling import sampler
from serve.sampling.slots import SamplingSlots

VOCAB = 50
CPU = torch.device("cpu")
SEEDS = (0, 1, -1, 2**63 - 1, -(2**63), 1234567)


@pytest.fixture
def rng() -> random.Random:
    seed = random.randrange(2**32)
    print("seed", seed)
    return random.Random(seed)


def sample(logits: Tensor, rows: list[SampleRow]) -> Tensor:
    """Call ``sampler.sample`` for rows that have not been sampled before."""
    slots = SamplingSlots(len(rows), CPU)
    return sampler.sample(logits, slots.place(rows), _newest(rows), slots)


def _newest(rows: list[SampleRow]) -> Tensor:
    return torch.tensor([row.token_ids[-1] for row in rows], dtype=torch.int64)


_numbers = itertools.count()


def _row(
    index: int = 0,
    prompt_ids: tuple[int, ...] = (0,),
    output_ids: tuple[int, ...] = (),
    banned_ids: tuple[int, ...] = (),
    **sampling: Any,
) -> SampleRow:
    index = index or len(output_ids)
    min_tokens = index + 1 if banned_ids else 0
    params = SamplingParams(max_tokens=10**6, min_tokens=min_tokens, **sampling)
    request = Request(id=f"r{next(_numbers)}", prompt=pack_ids(prompt_ids), sampling=params)
    return SampleRow(request, index, banned_ids, [*prompt_ids, *output_ids])


def _logits(rng: random.Random, rows: int, vocab: int = VOCAB, spread: float = 3.0) -> Tensor:
    generator = torch.Generator().manual_seed(rng.randrange(2**32))
    return torch.randn(rows, vocab, generator=generator) * spread


# --- the distribution ---------------------------------------------------------------------------


def _probabilities(logits: Tensor, params: SamplingParams) -> Tensor:
    """Compute a row's expected distribution step by step in float64."""
    scaled = [x / params.temperature for x in logits.double().tolist()]
    top = max(scaled)
    weights = [math.exp(x - top) for x in scaled]
    kept = [i for i, w in enumerate(weights) if w >= params.min_p]
    kept.sort(key=lambda i: (-weights[i], i))
    if params.top_k:
        kept = kept[: params.top_k]
    total, before = sum(weights[i] for i in kept), 0.0
    nucleus: list[int] = []
    for i in kept:
        if nucleus and params.top_p < 1 and before >= params.top_p * total:
            break
        nucleus.append(i)
        before += weights[i]
    probs = torch.zeros(len(scaled), dtype=torch.float64)
    probs[nucleus] = torch.tensor([weights[i] / before for i in nucleus], dtype=torch.float64)
    return probs


FILTERS: list[dict[str, Any]] = [
    {},
    {"temperature": 0.5},
    {"temperature": 2.0, "top_k": 5},
    {"top_k": 1},
    {"top_k": 1000},
    {"top_p": 0.8},
    {"top_p": 1e-9},
    {"min_p": 0.1},
    {"min_p": 1.0},
    {"temperature": 0.7, "top_k": 20, "top_p": 0.9, "min_p": 0.02},
]


@pytest.mark.parametrize("filters", FILTERS)
def test_samples_follow_the_filtered_distribution(filters: dict[str, Any]) -> None:
    logits = torch.randn(VOCAB, generator=torch.Generator().manual_seed(3)) * 2
    rows = [_row(i, seed=11, **filters) for i in range(4000)]
    tokens = sample(logits.expand(len(rows), -1).clone(), rows)
    counts = torch.bincount(tokens, minlength=VOCAB).double()
    expected = _probabilities(logits, rows[0].request.sampling) * len(rows)
    assert bool((counts[expected == 0] == 0).all())
    usual = expected >= 5  # rare cells are merged into one
    observed = torch.cat([counts[usual], counts[~usual].sum()[None]])
    merged = torch.cat([expected[usual], expected[~usual].sum()[None]])
    observed, merged = observed[merged > 0], merged[merged > 0]
    chi_square = float(((observed - merged) ** 2 / merged).sum())
    freedom = max(1, len(merged) - 1)
    assert chi_square < freedom + 4 * math.sqrt(2 * freedom) + 4


@pytest.mark.parametrize("filters", FILTERS)
def test_filters_keep_what_the_reference_keeps(filters: dict[str, Any], rng: random.Random) -> None:
    """Compare the tokens that the filters keep with the support of the reference."""
    logits = _logits(rng, 20)
    params = SamplingParams(max_tokens=1, **filters)
    filtered = logits / params.temperature
    sampler.apply_filters(filtered, SamplingSlots(20, CPU).place([_row(**filters)] * 20))
    for before, after in zip(logits, filtered, strict=True):
        kept = (_probabilities(before, params) > 0).tolist()
        assert after.isfinite().tolist() == kept
        unchanged = before / params.temperature
        assert torch.equal(after[kept], unchanged[kept])


def test_equal_logits_are_ranked_by_id() -> None:
    rows = [_row(i, top_k=3) for i in range(200)]
    assert set(sample(torch.zeros(200, VOCAB), rows).tolist()) == {0, 1, 2}
    rows = [_row(i, top_p=0.1) for i in range(200)]
    assert set(sample(torch.zeros(200, VOCAB), rows).tolist()) == {0, 1, 2, 3, 4}


# --- independence of the batch ------------------------------------------------------------------


def _random_row(rng: random.Random) -> SampleRow:
    prompt = tuple(rng.randrange(VOCAB) for _ in range(rng.randrange(1, 20)))
    output = tuple(rng.randrange(VOCAB) for _ in range(rng.randrange(20)))
    options: dict[str, list[Any]] = {
        "temperature": [0.0, 0.3, 1.0, 1.7],
        "top_p": [1.0, 0.9, 0.3],
        "top_k": [0, 1, 7],
        "min_p": [0.0, 0.05],
        "presence_penalty": [0.0, 0.7],
        "frequency_penalty": [0.0, -0.4],
        "repetition_penalty": [1.0, 1.3],
        "logit_bias": [{}, {3: 5.0, 4: -100.0}],
    }
    chosen = {name: rng.choice(values) for name, values in options.items()}
    banned = rng.choice([(), (5, 6, 5)])
    seed = rng.choice([*SEEDS, rng.randrange(-(2**63), 2**63)])
    return _row(0, prompt, output, banned, seed=seed, **chosen)


def test_a_row_gets_the_same_token_in_any_batch(rng: random.Random) -> None:
    rows = [_random_row(rng) for _ in range(60)]
    logits = _logits(rng, len(rows))
    alone = [int(sample(logits[i : i + 1].clone(), [row])) for i, row in enumerate(rows)]
    for _ in range(5):
        order = rng.sample(range(len(rows)), rng.randrange(1, len(rows) + 1))
        tokens = sample(logits[order].clone(), [rows[i] for i in order])
        assert tokens.tolist() == [alone[i] for i in order]


def test_chunks_make_no_difference(rng: random.Random, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [_random_row(rng) for _ in range(30)]
    logits = _logits(rng, len(rows))
    whole = sample(logits.clone(), rows)
    monkeypatch.setattr(sampler, "_CHUNK_ELEMENTS", 4 * VOCAB)
    assert torch.equal(sample(logits.clone(), rows), whole)


def test_seed_and_index_make_a_difference() -> None:
    rows = [_row(index, seed=seed) for seed in range(10) for index in range(10)]
    tokens = sample(torch.zeros(100, 10000), rows)
    assert len(set(tokens.tolist())) > 90


# --- penalties, bias, bans ----------------------------------------------------------------------


def _processed(logits: Tensor, row: SampleRow) -> list[float]:
    params = row.request.sampling
    values = logits.double().tolist()
    output_ids = row.token_ids[len(row.request.prompt_ids) :]
    for token in set(row.token_ids):
        factor = params.repetition_penalty
        values[token] = values[token] / factor if values[token] > 0 else values[token] * factor
    for token in set(output_ids):
        values[token] -= params.frequency_penalty * output_ids.count(token)
        values[token] -= params.presence_penalty
    for token, bias in params.logit_bias.items():
        values[token] += bias
    for token in row.end_token_ids if row.output_index < params.min_tokens else ():
        values[token] = -math.inf
    return values


def test_penalties_bias_and_bans_against_a_reference(rng: random.Random) -> None:
    rows = [_random_row(rng) for _ in range(100)]
    logits = _logits(rng, len(rows))
    processed = logits.clone()
    slots = SamplingSlots(len(rows), CPU)
    slots.adjust(processed, slots.place(rows), _newest(rows))
    expected = torch.tensor([_processed(x, r) for x, r in zip(logits, rows, strict=True)])
    assert torch.equal(processed == -math.inf, expected == -math.inf)
    finite = expected > -math.inf
    assert torch.allclose(processed[finite].double(), expected[finite].double(), atol=1e-4)


def test_greedy_rows_see_penalties_bias_and_bans() -> None:
    logits = torch.tensor([[5.0, 4.0, 3.0, 2.0]])
    greedy: dict[str, Any] = {"temperature": 0.0}

    def choice(row: SampleRow) -> int:
        return int(sample(logits.clone(), [row]))

    assert choice(_row(**greedy)) == 0
    assert choice(_row(prompt_ids=(0,), repetition_penalty=1.5, **greedy)) == 1
    assert choice(_row(output_ids=(0,), presence_penalty=1.5, **greedy)) == 1
    assert choice(_row(output_ids=(0, 0, 1), frequency_penalty=1.1, **greedy)) == 2
    assert choice(_row(prompt_ids=(0,), presence_penalty=2.0, **greedy)) == 0
    assert choice(_row(logit_bias={3: 10.0}, **greedy)) == 3
    assert choice(_row(banned_ids=(0, 1), logit_bias={0: 100.0}, **greedy)) == 2


def test_banned_ids_are_never_sampled() -> None:
    rows = [_row(i, banned_ids=(0, 2), temperature=1.5) for i in range(500)]
    logits = torch.tensor([9.0, 0.0, 9.0, 0.0]).expand(500, -1).clone()
    assert set(sample(logits, rows).tolist()) == {1, 3}


# --- greedy and extreme inputs ------------------------------------------------------------------


def test_greedy_is_argmax(rng: random.Random) -> None:
    logits = _logits(rng, 32, vocab=1000)
    tokens = sample(logits.clone(), [_row(i, temperature=0.0) for i in range(32)])
    assert tokens.dtype == torch.int64
    assert torch.equal(tokens, logits.argmax(dim=-1))
    assert int(sample(torch.zeros(1, 9), [_row(temperature=0.0)])) == 0


def test_a_tiny_temperature_is_greedy_too(rng: random.Random) -> None:
    logits = _logits(rng, 8)
    tokens = sample(logits.clone(), [_row(i, temperature=1e-30) for i in range(8)])
    assert torch.equal(tokens, logits.argmax(dim=-1))


def test_infinite_and_nan_logits_affect_only_their_row(rng: random.Random) -> None:
    for filters in FILTERS:
        logits = _logits(rng, 5)
        rows = [_row(i, **filters) for i in range(5)]
        expected = sample(logits.clone(), rows)
        logits[1] = math.nan
        logits[2] = -math.inf
        logits[3, 7] = math.inf
        tokens = sample(logits, rows)
        assert tokens[[0, 4]].tolist() == expected[[0, 4]].tolist()
        assert int(tokens[3]) == 7
        assert 0 <= int(tokens.min()) <= int(tokens.max()) < VOCAB


def test_padding_of_the_vocabulary_is_never_sampled() -> None:
    logits = torch.zeros(300, VOCAB)
    logits[:, 40:] = -math.inf
    tokens = sample(logits, [_row(i, temperature=2.0, top_p=0.99) for i in range(300)])
    assert int(tokens.max()) < 40


def test_no_rows() -> None:
    assert sample(torch.empty(0, VOCAB), []).tolist() == []
