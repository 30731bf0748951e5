"""The engine on GPUs: the reference's tokens, KV over NCCL, and transfers without hang or leak."""

from __future__ import annotations

import os
import random
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
import pytest
import torch

from serve.engine.warm_up import warm_up_pinned_memory
from serve.request import FinishReason
from tests.e2e.test_matrix import SPLITS, check_parity, greedy, random_jobs, run_case
from tests.support.cases import Answer, CaseResult, Job
from tests.support.checkpoints import ROPES, load_reference, write_llama_checkpoint
from tests.support.paths import ROOT
from tests.support.world import World

NUM_GPUS = torch.cuda.device_count() if torch.cuda.is_available() else 0

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(NUM_GPUS == 0, reason="there is no GPU"),
]

LLAMA_3_8B = ROOT / "bench" / "models" / "llama-3-8b"


def need(split: str) -> None:
    if SPLITS[split][0] > NUM_GPUS:
        pytest.skip(f"{split} needs {SPLITS[split][0]} GPUs, there are {NUM_GPUS}")


@pytest.fixture(scope="module")
def gpus() -> Iterator[World]:
    world = World(NUM_GPUS)
    yield world
    world.close()


def test_pinned_memory_is_allocated_before_serving() -> None:
    """The cache has buffers of every size, enough for several steps and pushes at once."""
    torch.cuda.init()  # type: ignore[no-untyped-call]  # the statistics need it
    warm_up_pinned_memory()
    before = torch.cuda.host_memory_stats()["num_host_alloc"]
    held = [
        torch.empty(size, dtype=torch.int32, pin_memory=True)
        for size in (1, 3, 100, 5000, 70_000, 2_000_000)
        for _ in range(8)
    ]
    assert torch.cuda.host_memory_stats()["num_host_alloc"] == before
    assert all(tensor.is_pinned() for tensor in held)


def test_kernels_are_loaded_at_start() -> None:
    """The driver reads CUDA_MODULE_LOADING at its first call and ignores later changes."""
    code = """
import ctypes
import os

import serve.launch
from serve.topology import read_rank_info
from serve.device import pick_device

print(pick_device(read_rank_info(os.environ).local_rank))
mode = ctypes.c_int()
assert ctypes.CDLL("libcuda.so.1").cuModuleGetLoadingMode(ctypes.byref(mode)) == 0
assert mode.value == 1  # CU_MODULE_EAGER_LOADING
"""
    environment = {k: v for k, v in os.environ.items() if k != "CUDA_MODULE_LOADING"}
    subprocess.run([sys.executable, "-c", code], env=environment, check=True, timeout=120)


def test_memory_is_allocated_before_serving() -> None:
    """A later allocation would wait for the running steps and delay all other work."""
    command = [sys.executable, "-m", "tests.support.memory_growth", str(LLAMA_3_8B)]
    subprocess.run(command, cwd=LLAMA_3_8B.parents[2], check=True, timeout=200)


FreshWorld = Callable[[int], World]


@pytest.fixture
def fresh() -> Iterator[FreshWorld]:
    """Make worlds for one job each, because a process can set up symmetric memory only once."""
    worlds: list[World] = []

    def make(size: int) -> World:
        worlds.append(World(size))
        return worlds[-1]

    yield make
    for world in worlds:
        world.close()


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_llama_checkpoint(tmp_path_factory.mktemp("small"), seed=1, num_kv_heads=2)


@pytest.mark.parametrize("split", [split for split in SPLITS if split != "tp 1 to 3"])
def test_float32_tokens_are_the_models(gpus: World, small: Path, split: str) -> None:
    need(split)
    jobs = random_jobs(11, 24)
    options = ["--dtype", "float32", "--max-num-batched-tokens", "24", "--max-num-seqs", "8"]
    check_parity(small, jobs, run_case(gpus, small, split, jobs, *options))


@pytest.mark.parametrize("rope", ROPES)
def test_each_rope_type(gpus: World, tmp_path: Path, rope: str) -> None:
    model = write_llama_checkpoint(tmp_path, seed=3, rope=rope)
    jobs = random_jobs(13, 8)
    options = ["--dtype", "float32", "--max-num-batched-tokens", "9", "--max-num-seqs", "8"]
    check_parity(model, jobs, run_case(gpus, model, "colocated", jobs, *options))


def check_near(model: Path, jobs: list[Job], result: CaseResult) -> None:
    """Check teacher-forced that tokens are about as good as those of a bfloat16 reference.

    Both are judged by how far their logits in float32 fall short of the best token's. That depends
    on the model: random models carry rounding errors further than trained ones.
    """
    exact, rounded = load_reference(model), load_reference(model).to(torch.bfloat16)
    served, reference = [], []
    for job, answer in zip(jobs, result.answers, strict=True):
        ids = torch.tensor([[*job.prompt_ids, *answer.token_ids]])
        places = slice(len(job.prompt_ids) - 1, -1)
        with torch.no_grad():
            logits = penalised(exact(ids).logits[0, places], job, answer)
            choices = penalised(rounded(ids).logits[0, places], job, answer).argmax(dim=1)
        served.append(_shortfalls(logits, torch.tensor(answer.token_ids)))
        reference.append(_shortfalls(logits, choices))
    found, allowed = torch.cat(served), torch.cat(reference)
    print(f"{_describe(found)}; the reference in bfloat16: {_describe(allowed)}")
    assert found.max() <= 2 * allowed.max() + 0.1
    assert found.mean() <= 2 * allowed.mean() + 0.002
    assert (found > 0).float().mean() <= 1.5 * (allowed > 0).float().mean() + 0.02


def penalised(logits: torch.Tensor, job: Job, answer: Answer) -> torch.Tensor:
    """Apply the job's repetition penalty to the logits of each output token."""
    factor, result = job.sampling.repetition_penalty, logits.clone()
    for index, row in enumerate(result):
        seen = torch.tensor(sorted({*job.prompt_ids, *answer.token_ids[:index]}))
        row[seen] = torch.where(row[seen] > 0, row[seen] / factor, row[seen] * factor)
    return result


def _shortfalls(logits: torch.Tensor, chosen: torch.Tensor) -> torch.Tensor:
    """Return how far each chosen token is below the best, relative to the largest logit."""
    best = logits.amax(dim=1)
    return (best - logits.gather(1, chosen[:, None])[:, 0]) / logits.abs().amax(dim=1)


def _describe(shortfalls: torch.Tensor) -> str:
    count = int((shortfalls > 0).sum())
    return f"{count} of {len(shortfalls)} tokens fall short, by {shortfalls.mean():.4f} in the mean"


@pytest.mark.parametrize("split", ["colocated", "1P+1D", "colocated tp 2", "tp 2 to 2"])
def test_bfloat16_tokens_are_as_good_as_the_references(
    fresh: FreshWorld, small: Path, split: str
) -> None:
    """Use the kernels, graphs and all-reduces of serving; some jobs have a repetition penalty."""
    need(split)
    jobs = random_jobs(17, 48)
    for job in jobs[::3]:
        job.sampling = msgspec.structs.replace(job.sampling, repetition_penalty=1.5)
    world = fresh(SPLITS[split][0])
    check_near(small, jobs, run_case(world, small, split, jobs, "--dtype", "bfloat16"))


def test_a_vocabulary_that_does_not_divide_over_ranks(fresh: FreshWorld, tmp_path: Path) -> None:
    need("colocated tp 2")
    model = write_llama_checkpoint(tmp_path, seed=6, num_kv_heads=2, vocab_size=127)
    jobs = random_jobs(31, 32, vocab_size=127)
    check_near(
        model, jobs, run_case(fresh(2), model, "colocated tp 2", jobs, "--dtype", "bfloat16")
    )


@pytest.mark.parametrize("split", ["1P+1D", "2P+2D", "tp 2 to 1", "tp 1 to 2", "tp 2 to 2"])
def test_symmetric_transport(fresh: FreshWorld, small: Path, split: str) -> None:
    """Send many pushes per prompt, so that every slot is reused many times."""
    need(split)
    jobs = random_jobs(29, 48, longest=120)
    options = ["--dtype", "float32", "--max-num-batched-tokens", "48", "--max-num-seqs", "8"]
    options += ["--block-size", "8", "--kv-push-bytes", "1", "--kv-transport", "symm"]
    world = fresh(SPLITS[split][0])
    check_parity(small, jobs, run_case(world, small, split, jobs, *options))


@pytest.mark.parametrize("split", ["2P+2D", "tp 2 to 2", "1P+1D"])
def test_tens_of_thousands_of_transfers(gpus: World, small: Path, split: str) -> None:
    """Send many small pushes over all pairs at once, with aborts: no hang, no leak."""
    need(split)
    rng = random.Random(19)
    jobs = [
        greedy([rng.randrange(128) for _ in range(rng.randint(64, 128))], rng.randint(1, 8))
        for _ in range(2200)
    ]
    for job in jobs[::5]:
        job.abort_after = rng.randint(0, 4)
    options = [
        "--block-size", "8", "--num-blocks", "160", "--max-num-batched-tokens", "512",
        "--max-num-seqs", "32", "--kv-push-bytes", "1", "--dtype", "float32",
    ]  # fmt: skip
    # With one block per push a prompt takes 8 to 16 pushes; together they are over 20,000.
    num_pushes = sum(-(-len(job.prompt_ids) // 8) for job in jobs if job.abort_after is None)
    print(f"at least {num_pushes} pushes")
    assert num_pushes > 20_000
    result = run_case(gpus, small, split, jobs, *options, timeout_s=400)
    finished = [(j, a) for j, a in zip(jobs, result.answers, strict=True) if j.abort_after is None]
    assert all(answer.finish_reason == FinishReason.LENGTH for _, answer in finished)
    sample = rng.sample(finished, 20)
    reference_jobs = [job for job, _ in sample]
    result.answers = [answer for _, answer in sample]
    check_parity(small, reference_jobs, result)


@pytest.mark.parametrize("split", ["colocated", "1P+1D", "tp 1 to 2", "tp 2 to 2"])
def test_llama_3_8b_shape(fresh: FreshWorld, split: str) -> None:
    need(split)
    rng = random.Random(23)
    jobs = [greedy([rng.randrange(128256) for _ in range(8192)], 8) for _ in range(4)]
    options = ["--load-format", "dummy", "--max-model-len", "8400", "--num-blocks", "600"]
    world = fresh(SPLITS[split][0])
    result = run_case(world, LLAMA_3_8B, split, jobs, *options, timeout_s=300)
    assert [len(answer.token_ids) for answer in result.answers] == [8] * 4
