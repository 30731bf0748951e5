"""The sampling kernels on a GPU: filters and penalties against the references."""

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
from serve.sampling.placed_rows import PlacedRows
from serve.sampling.sampler import apply_filters, sample
from serve.sampling.slots import SamplingSlots
from tests.support.penalised_requests import steps

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU"),
]

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)
VOCABS = [1, 17, 1000, 8192, 8193, 50257, 128256]
SMALL_BLOCK = 512  # a row of a few thousand ids then takes as many blocks as one of 128256 ids


@pytest.fixture(autouse=True)
def rng() -> random.Random:
    seed = random.randrange(2**32)
    print("seed", seed)
    torch.manual_seed(seed)
    return random.Random(seed)


_numbers = itertools.count()


def make_row(**sampling: Any) -> SampleRow:
    params = SamplingParams(max_tokens=1, **sampling)
    return SampleRow(Request(id=str(next(_numbers)), prompt=pack_ids((0,)), sampling=params), 0)


def place(rows: list[SampleRow]) -> PlacedRows:
    """Place rows that have not been sampled before."""
    return SamplingSlots(len(rows), CPU).place(rows)


def random_row(rng: random.Random, vocab_size: int) -> SampleRow:
    """Make a row with random filters. top_p is not round, so no sum equals it by design."""
    return make_row(
        top_k=rng.choice([0, 0, 1, 2, 50, vocab_size // 2, vocab_size, vocab_size + 5]),
        top_p=rng.choice([1.0, 1e-9, rng.random() + 1e-9, 0.9 + rng.random() / 10]),
        min_p=rng.choice([0.0, 0.0, 1.0, rng.random(), rng.random() / 1000]),
    )


def filtered(logits: Tensor, rows: list[SampleRow]) -> Tensor:
    """Filter ``logits`` (on the CPU, with temperature 1) by the kernel."""
    kernels = pytest.importorskip("serve.sampling.triton_filters")
    placed, vocab_size = place(rows), logits.shape[1]
    out = logits.to(GPU, copy=True)
    kernels.filter_logits(
        out,
        placed.column("min_p").log().to(GPU),
        placed.column("top_k").clamp(max=vocab_size).to(GPU),
        placed.column("top_p").to(GPU),
    )
    return out.cpu()


def assert_same_kept(logits: Tensor, rows: list[SampleRow]) -> None:
    """Check that the kernel rules out the reference's tokens and leaves the others unchanged."""
    expected = logits.clone()
    apply_filters(expected, place(rows))
    actual = filtered(logits, rows)
    for row, actual_row, expected_row in zip(rows, actual, expected, strict=True):
        wrong = (actual_row != expected_row).nonzero().flatten().tolist()
        assert not wrong, (row.request.sampling, len(wrong), wrong[:5])


def make_logits(kind: str, num_rows: int, vocab_size: int) -> Tensor:
    logits = torch.randn(num_rows, vocab_size) * 3
    if kind == "peaked":
        logits[:, : vocab_size // 100] += 15
    elif kind == "flat":
        logits *= 0.05
    elif kind == "ties":
        logits = logits.round()  # a few dozen values, with both zeros
    elif kind == "bfloat16":
        logits = logits.bfloat16().float()
    elif kind == "banned":
        logits[torch.rand(num_rows, vocab_size) < 0.7] = -math.inf
        logits[:, 0] = 0.0
    elif kind == "extremes":
        logits[:, ::3] = torch.finfo(torch.float32).min
        logits[:, ::5] *= 1e-40
    return logits


KINDS = ["usual", "peaked", "flat", "ties", "bfloat16", "banned", "extremes"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("vocab_size", VOCABS)
def test_kept_tokens(kind: str, vocab_size: int, rng: random.Random) -> None:
    rows = [random_row(rng, vocab_size) for _ in range(32)]
    assert_same_kept(make_logits(kind, len(rows), vocab_size), rows)


@pytest.mark.parametrize("kind", KINDS)
def test_kept_tokens_of_rows_of_many_blocks(
    kind: str, rng: random.Random, monkeypatch: pytest.MonkeyPatch
) -> None:
    kernels = pytest.importorskip("serve.sampling.triton_filters")
    monkeypatch.setattr(kernels, "_BLOCK", SMALL_BLOCK)
    vocab_size = 8 * SMALL_BLOCK + rng.randrange(SMALL_BLOCK)
    rows = [random_row(rng, vocab_size) for _ in range(32)]
    assert_same_kept(make_logits(kind, len(rows), vocab_size), rows)


def test_equal_logits_are_ranked_by_id() -> None:
    """Sums of powers of two are exact in any order, so top_p may equal one of them here."""
    logits = torch.zeros(6, 1 << 15)
    rows = [
        make_row(top_k=3),
        make_row(top_p=0.25),
        make_row(top_p=0.3),
        make_row(top_k=1 << 14, top_p=0.5),
        make_row(min_p=1.0, top_k=1 << 14),
        make_row(min_p=1.0),
    ]
    assert_same_kept(logits, rows)
    counts = [3, 1 << 13, math.ceil(0.3 * (1 << 15)), 1 << 13, 1 << 14, 1 << 15]
    kept = filtered(logits, rows).isfinite()
    assert kept.sum(1).tolist() == counts
    assert [bool(row[:count].all()) for row, count in zip(kept, counts, strict=True)] == [True] * 6


def test_filters_follow_each_other() -> None:
    """top_p is a share of what min_p and top_k keep: half of 4 equal logits, not of 6."""
    logits = torch.tensor([[1.0, 1.0, -9.0, 1.0, 1.0, 1.0, 1.0, -9.0]])
    kept = filtered(logits, [make_row(min_p=0.5, top_k=4, top_p=0.5)]).isfinite()
    assert kept.nonzero()[:, 1].tolist() == [0, 1]


def test_rows_without_a_filter_stay_as_they_are() -> None:
    logits = torch.randn(3, 1001)
    logits[1] = math.nan
    rows = [make_row(), make_row(temperature=0.0, top_k=2), make_row(top_k=1001)]
    torch.testing.assert_close(filtered(logits, rows), logits, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("bad", [math.nan, -math.inf, math.inf])
def test_infinite_and_nan_logits_affect_only_their_row(bad: float, rng: random.Random) -> None:
    vocab_size = 9001
    logits = make_logits("usual", 40, vocab_size)
    rows = [random_row(rng, vocab_size) for _ in logits]
    clean = filtered(logits, rows)
    logits[::4] = bad
    logits[1::4, 7] = bad
    actual = filtered(logits, rows)
    assert torch.equal(actual[2::4], clean[2::4])
    assert torch.equal(actual[3::4], clean[3::4])
    if bad == math.inf:
        assert bool((actual[1::4].argmax(1) == 7).all())
    tokens = sample_special_rows(logits, rows, torch.zeros(len(rows), dtype=torch.int64))
    assert 0 <= min(tokens) <= max(tokens) < vocab_size


def sample_special_rows(logits: Tensor, rows: list[SampleRow], input_ids: Tensor) -> list[int]:
    """Sample the rows that are not plain; the tokens of the others are 0."""
    gpu_sampler = pytest.importorskip("serve.sampling.gpu_sampler")
    tokens = torch.zeros(len(rows), dtype=torch.int64, device=GPU)
    slots = SamplingSlots(len(rows), GPU)
    placed = slots.place(rows)
    gpu_sampler.GpuSampler(slots).sample_special(logits.to(GPU), placed, input_ids.to(GPU), tokens)
    ids: list[int] = tokens.tolist()
    return ids


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("vocab_size", [1000, 128256])
def test_tokens_are_those_of_the_reference(
    vocab_size: int, dtype: torch.dtype, rng: random.Random
) -> None:
    """The rows mix penalties, bias, bans, temperature and filters. Plain rows stay unchanged."""
    long_bias = {token: rng.uniform(-5, 5) for token in rng.sample(range(vocab_size), 700)}
    long_stop = tuple(rng.sample(range(vocab_size), 600))
    rows = []
    for index in range(24):
        filters = random_row(rng, vocab_size).request.sampling
        sampling = SamplingParams(
            max_tokens=1,
            seed=rng.randrange(-(2**63), 2**63),
            temperature=rng.choice([0.0, 0.3, 1.0, 1.7]),
            top_k=filters.top_k,
            top_p=filters.top_p,
            min_p=filters.min_p,
            repetition_penalty=rng.choice([1.0, 1.3]),
            presence_penalty=rng.choice([0.0, 0.7]),
            logit_bias=rng.choice([{}, {3: 5.0, 4: -100.0}, long_bias]),
            stop_token_ids=rng.choice([(), (4, 9, 4), long_stop]),
            min_tokens=rng.choice([0, 10, 11]),
        )
        ids = tuple(rng.randrange(vocab_size) for _ in range(20))
        request = Request(id=str(index), prompt=pack_ids(ids[:11]), sampling=sampling)
        rows.append(SampleRow(request, 10, (5, 6), ids))
    logits = (torch.randn(len(rows), vocab_size) * 3).to(dtype)
    input_ids = torch.randint(vocab_size, (len(rows),))
    slots = SamplingSlots(len(rows), CPU)
    placed = slots.place(rows)
    expected = torch.zeros(len(rows), dtype=torch.int64)
    special = placed.find_special()
    expected[special] = sample(logits.float().clone(), placed, input_ids, slots)[special]
    assert sample_special_rows(logits, rows, input_ids) == expected.tolist()


def test_biases_and_bans_of_rows_that_come_and_go(rng: random.Random) -> None:
    """The kernel changes the reference's logits in the same way, with slots taken over."""
    vocab_size, num_slots = 5003, 5
    on_gpu, on_cpu = SamplingSlots(num_slots, GPU), SamplingSlots(num_slots, CPU)
    rows = [random_rules(rng, vocab_size) for _ in range(12)]
    for index in range(30):
        chosen = [
            SampleRow(row.request, index, row.end_token_ids)
            for row in rng.sample(rows, rng.randrange(1, num_slots + 1))
        ]
        logits = torch.randn(len(chosen), vocab_size)
        changed, newest = logits.to(GPU), torch.zeros(len(chosen), dtype=torch.int64)
        on_gpu.adjust(changed, on_gpu.place(chosen), newest.to(GPU))
        on_cpu.adjust(logits, on_cpu.place(chosen), newest)
        assert torch.equal(changed.cpu(), logits)


def random_rules(rng: random.Random, vocab_size: int) -> SampleRow:
    """Make a row with biases and bans. Some bans end in a later step, some tokens have both."""
    tokens = rng.sample(range(vocab_size), rng.choice([0, 1, 511, 512, 1024]))
    row = make_row(
        logit_bias={token: rng.uniform(-100, 100) for token in tokens},
        stop_token_ids=tuple(rng.sample(range(vocab_size), rng.choice([0, 3, 1024]))),
        min_tokens=rng.choice([0, 10, 100]),
    )
    return SampleRow(row.request, 0, (1, 2, vocab_size + 7))


@pytest.mark.parametrize("max_num_rows", [1, 7, 30])
def test_penalties_of_requests_that_come_and_go(max_num_rows: int, rng: random.Random) -> None:
    """Like ``tests.sampling.test_penalties``, also with rows whose last block is not full."""
    for vocab_size in (50, 5000):
        slots = SamplingSlots(max_num_rows, GPU)
        for changed, expected in steps(rng, slots, max_num_rows, vocab_size, GPU):
            assert torch.allclose(changed.double(), expected, atol=1e-4)
