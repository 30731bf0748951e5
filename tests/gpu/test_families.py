"""On GPUs: every family in bfloat16, with the kernels and graphs of serving."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch

from tests.e2e.test_matrix import greedy, run_case
from tests.gpu.test_engine import NUM_GPUS, FreshWorld, check_near, fresh
from tests.support.checkpoints import write_llama_checkpoint
from tests.support.families import VARIANTS, write_internlm2, write_variant

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU"),
]

__all__ = ["fresh"]


@pytest.mark.parametrize("transfer", [False, True])
def test_tokens_are_as_good_as_the_references(
    fresh: FreshWorld, tmp_path: Path, transfer: bool
) -> None:
    """All variants run in the same processes, because starting them takes most of the time."""
    if transfer and NUM_GPUS < 2:
        pytest.skip("a transfer needs two GPUs")
    world = fresh(2 if transfer else 1)
    wrong = {}
    for number, variant in enumerate([*VARIANTS, "internlm2"]):
        folder = tmp_path / str(number)
        folder.mkdir()
        if variant == "internlm2":
            source = write_llama_checkpoint(folder / "llama", seed=5)
            path = write_internlm2(folder / "internlm2", source)
        else:
            source = path = write_variant(folder / "model", variant, seed=1)
        rng = random.Random(number)
        jobs = [greedy(_prompt(rng), 24) for _ in range(12)]
        options = ["--dtype", "bfloat16", "--block-size", "64", "--max-num-batched-tokens", "32"]
        split = "1P+1D" if transfer else "colocated"
        print(variant, end=": ")
        result = run_case(world, path, split, jobs, *options)
        try:
            check_near(source, jobs, result)
        except AssertionError as error:  # go on, to report every family that fails
            wrong[variant] = str(error)
    assert not wrong


def _prompt(rng: random.Random) -> list[int]:
    return [rng.randrange(128) for _ in range(rng.randint(5, 120))]
