"""Jobs of up to four ranks, split in every way, return the reference's tokens and leak no block."""

from __future__ import annotations

import functools
import math
import random
from collections.abc import Sequence
from pathlib import Path

import msgspec
import pytest
from safetensors.torch import load_file, save_file

from serve.request import FinishReason, SamplingParams
from tests.support.cases import CaseResult, Job, at_rest
from tests.support.checkpoints import (
    ROPES,
    load_reference,
    reference_greedy,
    smollm2_gguf,
    write_llama_checkpoint,
)
from tests.support.smollm2 import GREEDY
from tests.support.world import World

# name: (ranks, options)
SPLITS: dict[str, tuple[int, list[str]]] = {
    "1P+1D": (2, ["--replica-spec", "1,1", "1,1", "--partition-id", "1"]),
    "2P+1D": (3, ["--replica-spec", "1,1", "1,1", "1,1", "--partition-id", "2"]),
    "1P+2D": (3, ["--replica-spec", "1,1", "1,1", "1,1", "--partition-id", "1"]),
    "2P+2D": (4, ["--replica-spec", *["1,1"] * 4, "--partition-id", "2"]),
    "tp 1 to 2": (3, ["--replica-spec", "1,1", "2,1", "--partition-id", "1"]),
    "tp 2 to 1": (3, ["--replica-spec", "2,1", "1,1", "--partition-id", "1"]),
    "tp 2 to 2": (4, ["--replica-spec", "2,1", "2,1", "--partition-id", "1"]),
    "tp 1 to 3": (4, ["--replica-spec", "1,1", "3,1", "--partition-id", "1"]),
    "colocated": (1, ["--replica-spec", "1,1", "--mode", "colocated"]),
    "colocated x2": (2, ["--replica-spec", "1,1", "1,1", "--mode", "colocated"]),
    "colocated tp 2": (2, ["--replica-spec", "2,1", "--mode", "colocated"]),
}


def run_case(
    world: World,
    model: Path,
    split: str,
    jobs: Sequence[Job],
    *options: str,
    timeout_s: float = 120.0,
) -> CaseResult:
    num_ranks, argv = SPLITS[split]
    argv = ["--model", str(model), *argv, *options]
    argv += ["--tokenizer", "none"]
    if "--num-blocks" not in argv:
        argv += ["--num-blocks", "128"]
    packed = msgspec.msgpack.encode(list(jobs))
    answers = world.run(
        "tests.support.cases:serve_case", argv, num_ranks, packed, timeout_s=timeout_s
    )
    answer = answers[0]
    result = msgspec.msgpack.decode(answer, type=CaseResult)
    assert at_rest(result.cluster), result.cluster
    return result


def greedy(prompt_ids: Sequence[int], max_tokens: int, abort_after: int | None = None) -> Job:
    sampling = SamplingParams(max_tokens=max_tokens, temperature=0.0, ignore_eos=True)
    return Job(tuple(prompt_ids), sampling, abort_after)


def random_jobs(seed: int, count: int, *, vocab_size: int = 128, longest: int = 40) -> list[Job]:
    print(f"seed={seed}")
    rng = random.Random(seed)
    return [
        greedy(
            [rng.randrange(vocab_size) for _ in range(rng.randint(1, longest))], rng.randint(1, 24)
        )
        for _ in range(count)
    ]


def check_parity(model: Path, jobs: Sequence[Job], result: CaseResult) -> None:
    """Compare every answer with the reference, token by token."""
    for expected, answer in zip(reference_tokens(model, jobs), result.answers, strict=True):
        assert answer.token_ids == list(expected)
        assert answer.finish_reason == FinishReason.LENGTH


def reference_tokens(model: Path, jobs: Sequence[Job]) -> tuple[tuple[int, ...], ...]:
    """Return the greedy tokens of each job, as transformers generates them."""
    return _generate_reference(
        model,
        tuple(
            (job.prompt_ids, job.sampling.max_tokens, job.sampling.repetition_penalty)
            for job in jobs
        ),
    )


# Most tests give the same jobs to several splits.
@functools.cache
def _generate_reference(
    model: Path, requests: tuple[tuple[tuple[int, ...], int, float], ...]
) -> tuple[tuple[int, ...], ...]:
    reference = load_reference(model)
    return tuple(reference_greedy(reference, *request) for request in requests)


@pytest.fixture(scope="session")
def gqa(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_llama_checkpoint(tmp_path_factory.mktemp("gqa"), seed=1)


@pytest.mark.parametrize("split", [split for split in SPLITS if split != "tp 1 to 3"])
def test_every_split_returns_the_references_tokens(world: World, gqa: Path, split: str) -> None:
    jobs = random_jobs(11, 12)
    chunk = ["--max-num-batched-tokens", "16", "--max-num-seqs", "8", "--block-size", "4"]
    result = run_case(world, gqa, split, jobs, *chunk, "--num-blocks", "64")
    check_parity(gqa, jobs, result)
    for answer in result.answers:
        stamps = answer.timeline
        order = [
            "arrived_s", "prefill_queued_s", "prefill_started_s", "prefill_ended_s",
            "decode_queued_s", "decode_started_s", "finished_s",
        ]  # fmt: skip
        present = [stamps[name] for name in order if name in stamps]
        assert present == sorted(present)
        if len(answer.token_ids) > 1:
            assert ("transfer_ended_s" in stamps) == ("colocated" not in split)


@pytest.mark.parametrize("split", ["1P+1D", "tp 2 to 1", "colocated", "colocated tp 2"])
def test_repetition_penalty_counts_every_earlier_token(world: World, gqa: Path, split: str) -> None:
    """The newest token counts too, although it is not known yet when the next step is planned."""
    jobs = random_jobs(37, 12)
    for number, job in enumerate(jobs):
        penalty = (1.0, 1.2, 1.6)[number % 3]
        job.sampling = msgspec.structs.replace(job.sampling, repetition_penalty=penalty)
    chunk = ["--max-num-batched-tokens", "16", "--max-num-seqs", "8", "--block-size", "4"]
    check_parity(gqa, jobs, run_case(world, gqa, split, jobs, *chunk))


@pytest.mark.parametrize("rope", ROPES)
def test_each_rope_type_matches_the_reference(world: World, tmp_path: Path, rope: str) -> None:
    model = write_llama_checkpoint(tmp_path, seed=2, rope=rope, num_heads=4, num_kv_heads=1)
    jobs = random_jobs(13, 6, longest=30)
    result = run_case(
        world, model, "1P+1D", jobs, "--max-num-batched-tokens", "9", "--max-num-seqs", "8",
        "--block-size", "8",
    )  # fmt: skip
    check_parity(model, jobs, result)


@pytest.mark.parametrize("budget", ["1", "3", "5", "64"])
def test_chunk_boundaries_do_not_change_the_tokens(world: World, gqa: Path, budget: str) -> None:
    jobs = random_jobs(17, 4, longest=23)
    options = ["--max-num-batched-tokens", budget, "--max-num-seqs", "1", "--block-size", "4"]
    check_parity(gqa, jobs, run_case(world, gqa, "1P+1D", jobs, *options))


def test_prompts_without_chunked_prefill(world: World, gqa: Path) -> None:
    jobs = random_jobs(19, 8)
    result = run_case(world, gqa, "1P+1D", jobs, "--no-enable-chunked-prefill")
    check_parity(gqa, jobs, result)


@pytest.mark.parametrize("split", ["1P+1D", "tp 1 to 2", "colocated"])
def test_preemption_does_not_change_the_tokens(world: World, gqa: Path, split: str) -> None:
    # Short answers come first, so that the decode replica expects the long ones to be short too.
    jobs = [greedy(range(i, i + 3), 2) for i in range(40)]
    jobs += [greedy(range(i, i + 20), 40) for i in range(6)]
    for job in jobs[::2]:
        job.sampling = msgspec.structs.replace(job.sampling, repetition_penalty=1.3)
    options = ["--num-blocks", "24", "--block-size", "4", "--max-model-len", "64"]
    result = run_case(world, gqa, split, jobs, *options)
    assert result.num_preemptions > 0
    check_parity(gqa, jobs, result)


@pytest.mark.parametrize("split", ["1P+1D", "colocated"])
def test_a_request_with_nan_logits_changes_no_other_request(
    world: World, tmp_path: Path, split: str
) -> None:
    """Neither the requests in the same batch nor those that get its blocks later."""
    model = write_llama_checkpoint(tmp_path, seed=5)
    weights = load_file(tmp_path / "model.safetensors")
    weights["model.embed_tokens.weight"][3] = math.nan
    weights["lm_head.weight"][3] = 0.0  # so that no answer contains it
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    jobs = random_jobs(43, 24)
    for job in jobs:
        job.prompt_ids = tuple(token if token != 3 else 4 for token in job.prompt_ids)
    with_nan = range(0, len(jobs), 4)
    for number in with_nan:
        jobs[number].prompt_ids += (3, 5, 6)
    options = ["--num-blocks", "24", "--block-size", "8", "--max-num-seqs", "3"]
    result = run_case(world, model, split, jobs, *options, "--max-num-batched-tokens", "32")
    sound = [number for number in range(len(jobs)) if number not in with_nan]
    check_parity(
        model,
        [jobs[number] for number in sound],
        CaseResult([result.answers[number] for number in sound], [], 0),
    )
    for number in with_nan:
        assert len(result.answers[number].token_ids) == jobs[number].sampling.max_tokens


def test_a_seed_gives_the_same_tokens_alone_and_in_a_batch(world: World, gqa: Path) -> None:
    def sampled(seed: int) -> Job:
        sampling = SamplingParams(
            max_tokens=20, temperature=1.3, top_p=0.9, top_k=40, seed=seed, ignore_eos=True
        )
        return Job(tuple(range(seed, seed + 9)), sampling)

    alone = run_case(world, gqa, "1P+1D", [sampled(5)])
    batched = run_case(world, gqa, "2P+2D", [sampled(seed) for seed in range(12)])
    assert alone.answers[0].token_ids == batched.answers[5].token_ids
    assert len({tuple(answer.token_ids) for answer in batched.answers}) == 12


@pytest.mark.parametrize("split", ["2P+2D", "tp 2 to 2", "colocated"])
def test_aborts_do_not_change_other_requests(world: World, gqa: Path, split: str) -> None:
    rng = random.Random(23)
    jobs = random_jobs(23, 32)
    for job in jobs[::2]:
        job.abort_after = rng.randint(0, 5)
    options = ["--max-num-batched-tokens", "8", "--max-num-seqs", "4", "--block-size", "4"]
    result = run_case(world, gqa, split, jobs, *options, "--num-blocks", "40")
    expected_tokens = reference_tokens(gqa, jobs)
    for job, answer, expected in zip(jobs, result.answers, expected_tokens, strict=True):
        assert answer.token_ids == list(expected)[: len(answer.token_ids)]
        if job.abort_after is None:
            assert answer.finish_reason == FinishReason.LENGTH
            assert len(answer.token_ids) == len(expected)


@pytest.mark.parametrize("split", ["tp 1 to 2", "tp 2 to 1"])
def test_one_kv_head_replicated_over_two_ranks(world: World, tmp_path: Path, split: str) -> None:
    model = write_llama_checkpoint(tmp_path, seed=4, num_kv_heads=1)
    jobs = random_jobs(37, 8)
    check_parity(model, jobs, run_case(world, model, split, jobs, "--block-size", "4"))


@pytest.mark.parametrize("split", ["2P+2D", "tp 2 to 2"])
@pytest.mark.parametrize("count", [60, pytest.param(2000, marks=pytest.mark.slow)])
def test_transfers_on_all_links_at_once_do_not_deadlock(
    world: World, gqa: Path, split: str, count: int
) -> None:
    """Every link is busy, each push carries one block, and the decode pools are full.

    Under these conditions two ranks that post their transfers in crossed order would deadlock.
    """
    jobs = random_jobs(41, count, longest=60)
    options = [
        "--block-size", "4", "--num-blocks", "40", "--max-model-len", "96", "--kv-push-bytes", "1",
        "--max-num-batched-tokens", "32", "--max-num-seqs", "8",
    ]  # fmt: skip
    result = run_case(world, gqa, split, jobs, *options, timeout_s=600)
    assert result.num_preemptions > 0, "the decode pools were full"
    check_parity(gqa, jobs[:30], CaseResult(result.answers[:30], [], 0))
    assert all(answer.finish_reason == FinishReason.LENGTH for answer in result.answers)


def test_nine_heads_over_three_ranks(world: World, tmp_path: Path) -> None:
    """The shape of SmolLM2: nine heads over three KV heads, tied embeddings."""
    model = write_llama_checkpoint(
        tmp_path, seed=6, num_heads=9, num_kv_heads=3, head_dim=8, tie=True
    )
    jobs = random_jobs(47, 8)
    check_parity(model, jobs, run_case(world, model, "tp 1 to 3", jobs, "--block-size", "4"))


@pytest.mark.parametrize(
    "split",
    ["1P+1D", *(pytest.param(split, marks=pytest.mark.slow) for split in ("2P+1D", "tp 1 to 3"))],
)
def test_smollm2_matches_the_reference(world: World, split: str) -> None:
    jobs = [greedy(prompt, len(tokens)) for prompt, tokens in GREEDY]
    options = ("--num-blocks", "64", "--max-model-len", "512")
    result = run_case(world, smollm2_gguf(), split, jobs, *options)
    assert [tuple(answer.token_ids) for answer in result.answers] == [t for _, t in GREEDY]
