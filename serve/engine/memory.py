"""The number of KV blocks: a profiling run measures the memory that is left for them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from serve.comm.tensor_parallel import TensorParallel
from serve.engine.dummy_steps import largest_steps, longest_context
from serve.engine.rank_setup import RankSetup
from serve.engine.runner import Runner
from serve.kv.cache import KVCache
from serve.topology import Role

if TYPE_CHECKING:
    from serve.engine.decode_graphs import DecodeGraphs  # needs Triton, as GPUs do

CPU_KV_BYTES = 2 << 30


def measure_num_blocks(setup: RankSetup, model: nn.Module, tp: TensorParallel) -> int:
    """Return the number of this rank's KV blocks: the option, or as many as memory allows.

    All other users of memory are allocated before, or measured here. Raises ``ValueError`` if no
    block fits.
    """
    layout = setup.layout
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
            f"no memory is left for the KV cache on {setup.device}: model, activations, staging "
            f"buffers and graphs take {peak_bytes >> 20} MiB of {total_bytes >> 20} MiB; raise "
            "--gpu-memory-utilization or lower --max-num-batched-tokens, --max-num-seqs or "
            "--kv-push-bytes"
        )
    return budget // layout.block_bytes


def _profile(setup: RankSetup, model: nn.Module, tp: TensorParallel) -> int:
    """Return the bytes in use on the device, by all processes, at the peak of the largest steps."""
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    cache = KVCache(setup.layout, 1, setup.dtype, setup.device)
    runner = Runner(model, cache, tp, setup.limits.max_num_seqs)
    for step in largest_steps(setup, longest_context(setup)):
        runner.run(step)
    torch.cuda.synchronize()
    own_bytes = torch.cuda.max_memory_reserved()
    free_bytes, total_bytes = torch.cuda.mem_get_info(setup.device)
    outside_bytes = total_bytes - free_bytes - torch.cuda.memory_reserved()
    del cache, runner
    torch.cuda.empty_cache()
    return outside_bytes + own_bytes


def uses_graphs(setup: RankSetup) -> bool:
    """Return whether decode steps run as CUDA graphs.

    They need a GPU. Prefill replicas have none, ``enforce_eager`` turns them off, and float32 has
    none because flash-attn does not support it.
    """
    return (
        setup.device.type == "cuda"
        and setup.replica.role is not Role.PREFILL
        and setup.dtype is not torch.float32
        and not setup.config.enforce_eager
    )


def make_graphs(
    setup: RankSetup, model: nn.Module, cache: KVCache, sampled: Tensor
) -> DecodeGraphs:
    """Make the decode graphs of this rank, without capturing them. ``sampled``: see ``Runner``."""
    from serve.engine.decode_graphs import DecodeGraphs

    has_windows = any(setup.config.model_config.windows)
    return DecodeGraphs(model, cache, sampled, longest_context(setup), has_windows=has_windows)


def _measure_graphs(setup: RankSetup, model: nn.Module) -> int:
    cache = KVCache(setup.layout, 1, setup.dtype, setup.device)
    sampled = torch.zeros(setup.limits.max_num_seqs, dtype=torch.int64, device=setup.device)
    graphs = make_graphs(setup, model, cache, sampled)
    num_bytes = graphs.measure_bytes()
    del graphs, cache
    torch.cuda.empty_cache()
    return num_bytes
