"""On a GPU: each kernel equals its formula, evaluated in float64 on the same inputs."""

from __future__ import annotations

import math
import random
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from serve.model.attention import PLAIN, Scoring
from serve.model.forward_batch import AttentionMetadata, DecodeSplits, build_forward_batch, fill_in
from serve.model.kernels import ops
from serve.model.kernels.head_norms import HeadNorms
from serve.protocol.plan import SampleRow, Step, StepSequence
from serve.request import Request, SamplingParams, pack_ids
from serve.sampling.sampler import sample
from serve.sampling.slots import SamplingSlots

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU"),
]

BLOCK_SIZE = 64
GPU = torch.device("cuda", 0)


@pytest.fixture(autouse=True)
def seeded() -> random.Random:
    seed = random.randrange(2**32)
    print("seed", seed)
    torch.manual_seed(seed)
    return random.Random(seed)


def assert_near(actual: Tensor, exact: Tensor, dtype: torch.dtype) -> None:
    """Check that errors are a few roundings of ``dtype``, relative to the largest value."""
    scale = exact.abs().max().item() + 1e-6
    error = (actual.double() - exact).abs().max().item() / scale
    assert error < {torch.bfloat16: 2e-2, torch.float16: 3e-3, torch.float32: 1e-5}[dtype]


def exact_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    metadata: AttentionMetadata,
    scoring: Scoring = PLAIN,
) -> Tensor:
    """Compute attention sequence by sequence in float64."""
    outs, row = [], 0
    for index, (new, total) in enumerate(
        zip(metadata.query_lengths, metadata.key_lengths, strict=True)
    ):
        table = metadata.block_tables[index, : -(-total // BLOCK_SIZE)].long()
        k = k_cache[table].flatten(0, 1)[:total].double()
        v = v_cache[table].flatten(0, 1)[:total].double()
        group = q.shape[1] // k.shape[1]
        k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
        part = q[row : row + new].double()
        scale = scoring.scale or 1 / math.sqrt(q.shape[2])
        scores = torch.einsum("qhd,khd->hqk", part, k) * scale
        if scoring.softcap is not None:
            scores = scoring.softcap * torch.tanh(scores / scoring.softcap)
        mask = torch.ones(new, total, dtype=torch.bool, device=q.device).tril(total - new)
        if scoring.window is not None:
            mask = mask.triu(total - new - scoring.window + 1)
        weights = scores.masked_fill(~mask, float("-inf")).softmax(-1)
        outs.append(torch.einsum("hqk,khd->qhd", weights, v))
        row += new
    return torch.cat(outs)


def make_case(
    lengths: list[tuple[int, int]], num_heads: int, num_kv_heads: int, dim: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor, AttentionMetadata]:
    """Make queries, caches and metadata for sequences of (new, total) tokens.

    Blocks are shuffled, and the cache is block-major as in serving.
    """
    counts = [-(-total // BLOCK_SIZE) for _, total in lengths]
    order = torch.randperm(sum(counts)).tolist()
    sequences = []
    for (new, total), count in zip(lengths, counts, strict=True):
        table, order = tuple(order[:count]), order[count:]
        sequences.append(StepSequence(total - new, (0,) * new, table, True))
    batch = build_forward_batch(Step(tuple(sequences)), BLOCK_SIZE, GPU)
    shape = (sum(counts), 3, 2, BLOCK_SIZE, num_kv_heads, dim)
    cache = torch.randn(shape, device=GPU, dtype=dtype)
    q = torch.randn(len(batch.token_ids), num_heads, dim, device=GPU, dtype=dtype)
    return q, cache[:, 1, 0], cache[:, 1, 1], batch.attention


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dim", [64, 96, 128, 256])
@pytest.mark.parametrize("group", [1, 2, 4, 8])
def test_attention(dim: int, group: int, dtype: torch.dtype) -> None:
    """Decodes, prefills with and without history, and all of them in one batch."""
    flash = pytest.importorskip("serve.model.flash_attention")
    attention, _ = flash.choose_attention(GPU, dtype, dim, BLOCK_SIZE)
    decodes = [(1, 1), (1, 64), (1, 65), (1, 700)]
    prefills = [(5, 5), (130, 130), (64, 200), (100, 1000), (1, 77)]
    for lengths in (decodes, prefills[:4], decodes + prefills):
        case = make_case(lengths, 2 * group, 2, dim, dtype)
        assert_near(attention(*case), exact_attention(*case), dtype)


@pytest.mark.parametrize(
    ("dim", "group", "block_size"),
    [(128, 3, 128), (128, 5, 128), (128, 7, 128), (128, 4, 128), (64, 7, 128), (256, 2, 128),
     (80, 1, 128), (96, 1, 128)],
)  # fmt: skip
def test_attention_of_published_shapes(
    dim: int, group: int, block_size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Group sizes of Qwen 2.5 and Phi-4, head sizes of OPT and Phi-3, default block size."""
    monkeypatch.setitem(globals(), "BLOCK_SIZE", block_size)
    flash = pytest.importorskip("serve.model.flash_attention")
    attention, _ = flash.choose_attention(GPU, torch.bfloat16, dim, BLOCK_SIZE)
    lengths = [(1, 1), (1, 129), (1, 700), (5, 5), (130, 130), (100, 1000)]
    case = make_case(lengths, 2 * group, 2, dim, torch.bfloat16)
    assert_near(attention(*case), exact_attention(*case), torch.bfloat16)


SCORINGS = {
    "window": Scoring(window=100),
    "window of one block": Scoring(window=64),
    "soft cap": Scoring(softcap=5.0),
    "scale": Scoring(scale=0.3),
    "all": Scoring(scale=0.2, window=129, softcap=3.0),
}


@pytest.mark.parametrize(("dim", "block_size"), [(64, 64), (96, 128), (128, 128), (256, 128)])
@pytest.mark.parametrize("name", SCORINGS)
def test_scoring(name: str, dim: int, block_size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks before every window have no effect, so they are overwritten with large values."""
    monkeypatch.setitem(globals(), "BLOCK_SIZE", block_size)
    flash = pytest.importorskip("serve.model.flash_attention")
    attention, _ = flash.choose_attention(GPU, torch.bfloat16, dim, BLOCK_SIZE)
    lengths = [(1, 1), (1, 65), (1, 700), (5, 5), (130, 130), (64, 700), (1, 77)]
    q, k, v, metadata = make_case(lengths, 8, 2, dim, torch.bfloat16)
    scoring = SCORINGS[name]
    exact = exact_attention(q, k, v, metadata, scoring)
    if scoring.window is not None:
        for index, (new, total) in enumerate(lengths):
            unseen = max(0, total - new + 1 - scoring.window) // BLOCK_SIZE
            k[metadata.block_tables[index, :unseen].long()] = 100.0
            v[metadata.block_tables[index, :unseen].long()] = 100.0
    assert_near(attention(q, k, v, metadata, scoring), exact, torch.bfloat16)


@pytest.mark.parametrize("count", [2, 3, 16])
@pytest.mark.parametrize(("dim", "block_size"), [(64, 64), (128, 64), (128, 128), (256, 128)])
def test_split_decode(
    dim: int, block_size: int, count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Slices without blocks (short sequences, many splits) have no effect."""
    monkeypatch.setitem(globals(), "BLOCK_SIZE", block_size)
    flash = pytest.importorskip("serve.model.flash_attention")
    dtype = torch.bfloat16
    attention, _ = flash.choose_attention(GPU, dtype, dim, BLOCK_SIZE)
    q, k, v, metadata = make_case([(1, 1), (1, 130), (1, 5000), (1, 64)], 8, 2, dim, dtype)
    kernels = pytest.importorskip("serve.model.kernels.triton_decode")
    width = metadata.block_tables.shape[1]
    flat = metadata.block_tables.flatten()
    offsets = torch.arange(4, device=GPU, dtype=torch.int32) * width
    tables, lengths = kernels.slice_tables(
        flat, offsets, metadata.seqlens_k, count, width, BLOCK_SIZE
    )
    numbers = torch.arange(4 * count + 1, device=GPU, dtype=torch.int32)
    splits = DecodeSplits(count, numbers, lengths, tables)
    split = attention(q.repeat(count, 1, 1), k, v, replace(metadata, splits=splits))
    assert_near(split, exact_attention(q, k, v, metadata), dtype)


@pytest.mark.parametrize("before", [-(2**31), -1, 0, 2**31 - 1])
@pytest.mark.parametrize("dim", [64, 128])
def test_rows_that_fill_up_a_batch(dim: int, before: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows without positions, as pad a decode graph, do not affect the others.

    For such a row the kernel reads the table entry before the row's first one. That entry is within
    the allocation even for the first row, and its value has no effect.
    """
    monkeypatch.setitem(globals(), "BLOCK_SIZE", 128)
    flash = pytest.importorskip("serve.model.flash_attention")
    kernels = pytest.importorskip("serve.model.kernels.triton_decode")
    dtype = torch.bfloat16
    attention, _ = flash.choose_attention(GPU, dtype, dim, BLOCK_SIZE)
    q, k, v, metadata = make_case([(1, 1), (1, 700), (1, 1)], 8, 2, dim, dtype)
    width = metadata.block_tables.shape[1]
    offsets = torch.arange(3, device=GPU, dtype=torch.int32) * width
    lengths = metadata.seqlens_k * torch.tensor([0, 1, 0], device=GPU, dtype=torch.int32)
    flat = metadata.block_tables.flatten()
    tables, lengths = kernels.slice_tables(flat, offsets, lengths, 1, width, BLOCK_SIZE)
    torch.as_strided(tables, (1,), (1,), tables.storage_offset() - 1).fill_(before)
    tables[0] = before
    filled = replace(metadata, seqlens_k=lengths, block_tables=tables)
    assert_near(attention(q, k, v, filled)[1:2], exact_attention(q, k, v, metadata)[1:2], dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("size", [576, 4096, 12288])
@pytest.mark.parametrize("num_rows", [1, 7, 300])
def test_norms(num_rows: int, size: int, dtype: torch.dtype) -> None:
    x = torch.randn(num_rows, size, device=GPU, dtype=dtype)
    residual = torch.randn_like(x)
    weight = torch.randn(size, device=GPU, dtype=dtype)

    def exact(values: Tensor) -> Tensor:
        wide = values.double()
        scale = torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-5)
        return wide * scale * weight.double()

    assert_near(ops.rms_norm(residual, weight, 1e-5), exact(residual), dtype)
    unit_offset = ops.rms_norm(residual, weight - 1, 1e-5, unit_offset=True)
    assert_near(unit_offset, exact(residual), dtype)
    total = residual + x
    normed = ops.add_rms_norm(x, residual, weight, 1e-5)
    torch.testing.assert_close(residual, total, rtol=0, atol=0)
    assert_near(normed, exact(total), dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(
    ("out_features", "size"), [(4096, 4096), (7, 576), (1001, 8192), (5, 9000)]
)
@pytest.mark.parametrize("num_rows", [1, 2])
def test_linear(num_rows: int, out_features: int, size: int, dtype: torch.dtype) -> None:
    """One row has its own kernel; with and without a bias, and with an output tensor."""
    x = torch.randn(num_rows, size, device=GPU, dtype=dtype)
    weight = torch.randn(out_features, size, device=GPU, dtype=dtype)
    bias = 100 * torch.randn(out_features, device=GPU, dtype=dtype)
    exact = x.double() @ weight.double().T
    assert_near(ops.linear(x, weight), exact, dtype)
    assert_near(ops.linear(x, weight, bias), exact + bias.double(), dtype)
    out = torch.full((num_rows, out_features), float("nan"), device=GPU, dtype=dtype)
    assert ops.linear(x, weight, out=out) is out
    assert_near(out, exact, dtype)


def test_tokens_of_the_previous_step_are_filled_in() -> None:
    kernels = pytest.importorskip("serve.model.kernels.triton_decode")
    sampled = torch.randint(1000, (300,), device=GPU)
    token_ids = torch.randint(-300, 1000, (300,), device=GPU)
    out = torch.empty_like(token_ids)
    assert kernels.fill_in(token_ids, sampled, out) is out
    torch.testing.assert_close(out, fill_in(token_ids, sampled))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("num_rows", "size"), [(1, 1536), (64, 14336), (513, 300)])
def test_silu_mul(num_rows: int, size: int, dtype: torch.dtype) -> None:
    x = torch.randn(num_rows, 2 * size, device=GPU, dtype=dtype)
    gate, up = x.double().chunk(2, dim=-1)
    assert_near(ops.gate(x, "silu"), torch.nn.functional.silu(gate) * up, dtype)
    gelu = torch.nn.functional.gelu(gate, approximate="tanh")
    assert_near(ops.gate(x, "gelu_tanh"), gelu * up, dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("heads", "kv_heads", "dim"), [(32, 8, 128), (9, 3, 64), (4, 4, 96)])
@pytest.mark.parametrize("copies", [1, 3])
def test_rope_write(heads: int, kv_heads: int, dim: int, dtype: torch.dtype, copies: int) -> None:
    num_tokens, num_blocks = 50, 6
    qkv = torch.randn(num_tokens, (heads + 2 * kv_heads) * dim, device=GPU, dtype=dtype)
    angles = torch.randn(num_tokens, dim // 2, device=GPU)
    slots = torch.randperm(num_blocks * BLOCK_SIZE, device=GPU)[:num_tokens]
    shape = (num_blocks, 2, 2, BLOCK_SIZE, kv_heads, dim)
    cache = torch.zeros(shape, device=GPU, dtype=dtype)
    exact = torch.zeros(shape, device=GPU, dtype=torch.float64)
    caches = cache[:, 1, 0], cache[:, 1, 1]
    q = ops.rope_write(qkv, angles.cos(), angles.sin(), *caches, slots, copies)
    wide = qkv.double().view(num_tokens, -1, dim)
    expected = ops.rotate(wide[:, : heads + kv_heads], angles.double().cos(), angles.double().sin())
    blocks, offsets = slots // BLOCK_SIZE, slots % BLOCK_SIZE
    exact[blocks, 1, 0, offsets] = expected[:, heads:]
    exact[blocks, 1, 1, offsets] = wide[:, heads + kv_heads :]
    assert_near(q, expected[:, :heads].repeat(copies, 1, 1), dtype)
    assert_near(cache, exact, dtype)
    for value in (math.nan, math.inf, -math.inf):
        ops.rope_write(torch.full_like(qkv, value), angles.cos(), angles.sin(), *caches, slots)
        assert_near(cache, torch.zeros_like(exact), dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("dim", "heads"), [(128, (0, 1, 2, 3)), (64, (2, 3)), (96, (3, 0, 1))])
def test_packing(dim: int, heads: tuple[int, ...], dtype: torch.dtype) -> None:
    """Exactly the chosen blocks and heads are packed and unpacked."""
    kernels = pytest.importorskip("serve.comm.pack_kernels")
    source = torch.randn(9, 3, 2, 16, 4, dim, device=GPU, dtype=dtype)
    target = torch.randn_like(source)
    before = target.clone()
    sent, received = torch.tensor([5, 0, 8], device=GPU), torch.tensor([1, 7, 2], device=GPU)
    index = torch.tensor(heads, device=GPU)
    packed = source.new_empty(3, 3, 2, 16, len(heads), dim)
    kernels.pack(source, sent, index, packed)
    torch.testing.assert_close(packed, source[sent].index_select(4, index), rtol=0, atol=0)
    kernels.unpack(packed, received, index, target)
    for block, place in zip(sent, received, strict=True):
        before[place][..., index, :] = source[block][..., index, :]
    torch.testing.assert_close(target, before, rtol=0, atol=0)


@pytest.mark.parametrize("unit_offset", [None, False, True])
@pytest.mark.parametrize("rotary", [128, 96, 64])
def test_part_of_a_head_is_rotated_and_all_of_it_normed(
    rotary: int, unit_offset: bool | None
) -> None:
    heads, kv_heads, dim, num_tokens = 8, 2, 128, 9
    qkv = torch.randn(num_tokens, (heads + 2 * kv_heads) * dim, device=GPU)
    angles = torch.randn(num_tokens, rotary // 2, device=GPU)
    weights = torch.randn(2, dim, device=GPU)
    norms = None if unit_offset is None else HeadNorms(weights[0], weights[1], 1e-5, unit_offset)
    slots = torch.randperm(2 * BLOCK_SIZE, device=GPU)[:num_tokens]
    cache = torch.zeros(2, 2, 2, BLOCK_SIZE, kv_heads, dim, device=GPU)
    caches = cache[:, 1, 0], cache[:, 1, 1]
    q = ops.rope_write(qkv, angles.cos(), angles.sin(), *caches, slots, 1, norms)
    expected = cache.cpu().zero_()
    q_weight, k_weight = weights.cpu()
    on_cpu = None if norms is None else HeadNorms(q_weight, k_weight, 1e-5, bool(unit_offset))
    args = qkv.cpu(), angles.cpu().cos(), angles.cpu().sin()
    q_cpu = ops.rope_write(*args, expected[:, 1, 0], expected[:, 1, 1], slots.cpu(), 1, on_cpu)
    torch.testing.assert_close(q.cpu(), q_cpu, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(cache.cpu(), expected, rtol=1e-5, atol=1e-5)
    qkv[:, ::7] = math.nan
    ops.rope_write(qkv, angles.cos(), angles.sin(), *caches, slots, 1, norms)
    assert bool(cache.isfinite().all())


def test_combining_ignores_parts_without_positions() -> None:
    parts = torch.randn(3 * 4, 5, 64, device=GPU, dtype=torch.bfloat16)
    lse = torch.randn(5, 12, device=GPU)
    lse[:, 4:6] = float("-inf")
    parts[4:6] = float("nan")
    weights = lse.double().view(5, 3, 4).softmax(1)
    exact = torch.einsum("hsr,srhd->rhd", weights, parts.double().nan_to_num().view(3, 4, 5, 64))
    assert_near(ops.combine_splits(parts, lse, 3), exact, torch.bfloat16)


@pytest.mark.parametrize("vocab_size", [1000, 128256])
def test_plain_rows_are_sampled_as_the_reference_does(
    vocab_size: int, seeded: random.Random
) -> None:
    """Token for token: the noise is the same function, and equal scores go to the smaller id."""
    kernels = pytest.importorskip("serve.sampling.triton_sampling")
    temperatures = [0.0, 0.0, 0.3, 1.0, 1.0, 1.7, 2.0]
    rows = [
        SampleRow(
            Request(
                id=str(output_index),
                prompt=pack_ids((1,)),
                sampling=SamplingParams(
                    max_tokens=1, temperature=temperature, seed=seeded.randrange(-(2**63), 2**63)
                ),
            ),
            output_index,
        )
        for output_index, temperature in enumerate(temperatures)
    ]
    logits = torch.randn(len(rows), vocab_size, device=GPU) * 3
    logits[0] = 0.0  # all equal
    slots = SamplingSlots(len(rows), GPU)
    placed = slots.place(rows)
    tokens = torch.empty(len(rows), dtype=torch.int64, device=GPU)
    kernels.sample_plain(
        logits,
        placed.column("temperature").to(GPU),
        torch.from_numpy(placed.streams()).to(GPU),
        tokens,
    )
    assert tokens.tolist() == sample(logits.clone(), placed, tokens, slots).tolist()
