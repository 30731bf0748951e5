"""How many KV blocks fit beside the model: what a profiling run leaves free."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from serve.comm.messages import SampleRow, Step, StepSequence
from serve.comm.tensor_parallel import TensorParallel
from serve.config import Role
from serve.engine.kv_cache import KVCache
from serve.engine.rank_setup import RankSetup
from serve.engine.runner import Runner
from serve.request import Request, SamplingParams

if TYPE_CHECKING:
    from serve.engine.decode_graphs import DecodeGraphs  # needs Triton, as GPUs do

CPU_KV_BYTES = 2 << 30
_MAX_PINNED_POWER = 23  # of two: bytes; the largest step's integers take less
_SMALL_PINNED_POWER = 14


def measure_num_blocks(setup: RankSetup, model: nn.Module, tp: TensorParallel) -> int:
    """KV blocks of this rank: the option, or what memory allows. ``ValueError`` if it is none.

    All that takes memory beside them is there already, or measured here.
    """
    layout = setup.layouts(setup.replica)[setup.topology.tp_rank(setup.place.rank)]
    if setup.config.num_blocks is not None:
        return setup.config.num_blocks
    if setup.device.type == "cpu":
        return max(1, CPU_KV_BYTES // layout.block_bytes)
    peak_bytes = _profile(setup, model, tp)
    if uses_graphs(setup):
        peak_bytes += _measure_graphs(setup, model)
    total_bytes = torch.cuda.mem_get_info(setup.device)[1]
    budget = int(total_bytes * setup.limits.gpu_memory_utilization) - peak_bytes
    if budget < layout.block_bytes:
        raise ValueError(
            f"no memory is left for the KV cache on {setup.device}: model, activations and staging "
            f"buffers take {peak_bytes >> 20} MiB of {total_bytes >> 20} MiB; "
            "raise --gpu-memory-utilization or lower --max-num-batched-tokens or --kv-push-bytes"
        )
    return budget // layout.block_bytes


def _profile(setup: RankSetup, model: nn.Module, tp: TensorParallel) -> int:
    """Bytes in use on the device at the peak of the largest steps, all processes' included."""
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    free_bytes, total_bytes = torch.cuda.mem_get_info(setup.device)
    outside_bytes = total_bytes - free_bytes - torch.cuda.memory_reserved()
    layout = setup.layouts(setup.replica)[setup.topology.tp_rank(setup.place.rank)]
    longest = _longest(setup)
    # One block stands in for all: the tables repeat it, and the lengths are the real ones.
    cache = KVCache(layout, 1, setup.dtype, setup.device)
    runner = Runner(model, cache, tp, setup.limits.max_num_seqs)
    table = (0,) * layout.num_blocks_for(longest)
    runner.run(_last_chunk(longest, min(longest, setup.limits.max_num_batched_tokens), table))
    runner.run(_decodes(longest, setup.limits.max_num_seqs, table))
    torch.cuda.synchronize()
    own_bytes = torch.cuda.max_memory_reserved()
    del cache, runner
    torch.cuda.empty_cache()
    return outside_bytes + own_bytes


def warm_up_pinned_memory() -> None:
    """Fill torch's cache of pinned memory, which has lists by power of two.

    An empty list is filled by the driver, which waits for all that runs on the device: a push that
    met this behind a prefill would be a whole prompt late.
    """
    held = [
        torch.empty(1 << power, dtype=torch.uint8, pin_memory=True)
        for power in range(_MAX_PINNED_POWER + 1)
        for _ in range(64 if power <= _SMALL_PINNED_POWER else 8)
    ]
    del held


def uses_graphs(setup: RankSetup) -> bool:
    """Whether decode steps are CUDA graphs: where there are any, in a type that flash-attn has."""
    return (
        setup.device.type == "cuda"
        and setup.replica.role is not Role.PREFILL
        and setup.dtype is not torch.float32
        and not setup.config.enforce_eager
    )


def make_graphs(
    setup: RankSetup, model: nn.Module, cache: KVCache, sampled: Tensor
) -> DecodeGraphs:
    """The decode graphs of this rank, not captured yet. ``sampled``: see ``Runner``."""
    from serve.engine.decode_graphs import DecodeGraphs

    has_windows = any(setup.config.model_config.windows)
    return DecodeGraphs(model, cache, sampled, _longest(setup), has_windows=has_windows)


def _measure_graphs(setup: RankSetup, model: nn.Module) -> int:
    layout = setup.layouts(setup.replica)[setup.topology.tp_rank(setup.place.rank)]
    cache = KVCache(layout, 1, setup.dtype, setup.device)
    sampled = torch.zeros(setup.limits.max_num_seqs, dtype=torch.int64, device=setup.device)
    graphs = make_graphs(setup, model, cache, sampled)
    num_bytes = graphs.measure_bytes()
    del graphs, cache
    torch.cuda.empty_cache()
    return num_bytes


def _longest(setup: RankSetup) -> int:
    return setup.config.max_model_len or setup.config.model_config.max_position_embeddings


def _last_chunk(longest: int, count: int, table: tuple[int, ...]) -> Step:
    """The end of the longest prompt."""
    return Step(0, (StepSequence(longest - count, (0,) * count, table, True),), (_row(),))


def _decodes(longest: int, count: int, table: tuple[int, ...]) -> Step:
    """Every sequence at the end of the longest context."""
    sequences = (StepSequence(longest - 1, (0,), table, True),) * count
    return Step(0, sequences, (_row(),) * count)


def _row() -> SampleRow:
    sampling = SamplingParams(max_tokens=1, top_p=0.9, top_k=50, repetition_penalty=1.1)
    return SampleRow(Request(id="profile", prompt_ids=(0,), sampling=sampling), 0)
