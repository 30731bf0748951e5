"""A model over several ranks gives the logits of a model on one rank, on the leader only."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.multiprocessing.spawn import spawn

from serve.comm.tensor_parallel import TensorParallel
from serve.kv.cache import KVCache
from serve.model.forward_batch import build_forward_batch
from serve.model.registry import build_model
from serve.model.weights.load import load_weights
from serve.model_config.file import load_model_config
from serve.protocol.plan import Step, StepSequence

BLOCK_SIZE = 4
BIASES = {"attention_bias": True, "mlp_bias": True}
CASES: dict[str, tuple[tuple[int, ...], dict[str, Any]]] = {  # group sizes, shape
    "grouped": ((2,), {"num_heads": 4, "num_kv_heads": 2, "tie": True}),
    "fewer kv heads than ranks": ((2, 3), {"num_heads": 6, "num_kv_heads": 1, **BIASES}),
    "uneven": ((2, 3), {"num_heads": 6, "num_kv_heads": 6, "intermediate_size": 97} | BIASES),
    "uneven vocabulary": ((2, 3), {"num_heads": 6, "num_kv_heads": 3, "vocab_size": 101}),
    "groups that straddle": ((3,), {"num_heads": 6, "num_kv_heads": 2, **BIASES}),
    "as SmolLM2": ((3,), {"num_heads": 9, "num_kv_heads": 3, "head_dim": 8, "tie": True}),
    "ranks with nothing": ((3,), {"num_heads": 3, "num_kv_heads": 3, "intermediate_size": 4}),
    "less vocabulary than ranks": ((3,), {"num_heads": 3, "num_kv_heads": 1, "vocab_size": 4}),
}


def logits_of(path: str, tp: TensorParallel) -> list[torch.Tensor | None]:
    """Return logits of a prompt in two chunks, then of a decode row beside a new prompt."""
    config = load_model_config(path)
    model = build_model(config, tp, torch.float32, "cpu")
    load_weights(model, path, "auto", seed=0)
    cache = KVCache(config.kv_layout(BLOCK_SIZE, 4, tp.size, tp.rank), 8, torch.float32, "cpu")
    vocab = config.vocab_size
    prompt = tuple(7 * i % vocab for i in range(9))
    steps = [
        Step((StepSequence(0, prompt[:5], (3, 1), False),)),
        Step((StepSequence(5, prompt[5:], (3, 1, 6), True),)),
        Step(
            (
                StepSequence(9, (2,), (3, 1, 6), True),
                StepSequence(0, (1, 3, 2), (4,), True),
                StepSequence(0, (2,), (5,), True),
            ),
        ),
    ]
    return [model(build_forward_batch(step, BLOCK_SIZE, "cpu"), cache) for step in steps]


def run_rank(rank: int, size: int, init: str, jobs: list[tuple[str, tuple[int, ...]]]) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=init, rank=rank, world_size=size, timeout=timedelta(seconds=60)
    )
    groups = {
        2: dist.new_group([1, 2]),
        3: dist.new_group([0, 1, 2]),
    }  # a leader that is not rank 0
    for path, tp_sizes in jobs:
        for tp_size in tp_sizes:
            first = size - tp_size
            if rank < first:
                continue
            tp = TensorParallel(rank - first, tp_size, groups[tp_size])
            got = logits_of(path, tp)
            if tp.is_leader:
                for sharded, alone in zip(got, logits_of(path, TensorParallel(0, 1)), strict=True):
                    assert sharded is not None
                    assert alone is not None
                    assert sharded.dtype == torch.float32
                    # Sums over ranks round differently, in proportion to the largest terms.
                    assert sharded.shape == alone.shape
                    largest = max(map(abs, alone.flatten().tolist()), default=0.0)
                    assert torch.allclose(sharded, alone, rtol=0, atol=1e-4 * largest), path
                    assert torch.equal(sharded.argmax(-1), alone.argmax(-1)), path
            else:
                assert got == [None, None, None]
    dist.destroy_process_group()


def test_logits_equal_those_of_one_rank(tmp_path: Path) -> None:
    """One world of three processes serves all shapes, because starting it takes the time."""
    # Not at the top, because the ranks import this module and would wait for transformers.
    from tests.support.checkpoints import write_llama_checkpoint

    jobs = []
    for number, (name, (tp_sizes, options)) in enumerate(CASES.items()):
        path = write_llama_checkpoint(tmp_path / name, seed=number, **options)
        jobs.append((str(path), tp_sizes))
    spawn(  # type: ignore[no-untyped-call]
        run_rank, (3, f"file://{tmp_path}/init", jobs), nprocs=3
    )


@pytest.mark.parametrize(
    ("rank", "size", "reason"),
    [(1, 1, "one of 1 ranks"), (-1, 2, "one of 2 ranks"), (0, 2, "needs a process group")],
)
def test_an_invalid_rank_is_refused(rank: int, size: int, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        TensorParallel(rank, size, None)
