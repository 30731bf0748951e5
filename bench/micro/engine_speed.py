"""Compare one GPU's steps with the floor that its memory and its matrix products set.

    python -m bench.micro.engine_speed MODEL_DIRECTORY [--decode 64x1024 ...] [--prefill 1x8192 ...]

Prints one JSON object a line: the time of a step and its floor, measured in turns so that both see
the same clocks. Steps run as in serving. A decode step is a CUDA graph from embedding to token id.
The host prepares a prefill step while the one before it runs; ``from_idle_ms`` is the time of a
step for which the GPU has to wait. The floor of a decode step is all its matrix products in a CUDA
graph, plus the bytes of its KV cache over the bandwidth of a copy. The floor of a prefill step is
its matrix products plus attention over contiguous memory. Under torchrun the ranks share the model
by tensor parallelism, and the floor is that of one rank.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import statistics
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional

from bench.micro.one_replica import join_ranks
from serve.comm.symmetric import SymmetricReduction
from serve.device import pick_device
from serve.engine.runner import Runner
from serve.kv.cache import KVCache
from serve.model.flash_attention import choose_attention, preferred_block_size
from serve.model.registry import build_model
from serve.model.weights.load import load_weights
from serve.model_config.file import load_model_config
from serve.protocol.plan import SampleRow, Step, StepSequence
from serve.request import Request, SamplingParams, pack_ids
from serve.runtime.shutdown import exit_now
from serve.sampling.slots import SamplingSlots
from serve.topology import read_rank_info

RANK_INFO = read_rank_info(os.environ)
DEVICE = pick_device(RANK_INFO.local_rank)
DTYPE = torch.bfloat16
BLOCK_SIZE = preferred_block_size(DEVICE)
DECODES = ["1x1024", "64x1024", "64x4096", "8x32768", "256x1024", "1x131072"]
PREFILLS = ["1x8192", "16x512"]
NUM_ROUNDS = 10
COPY_BYTES = 1 << 32


class Engine:
    """One GPU with a model of random weights."""

    def __init__(self, path: Path, max_tokens: int, max_num_seqs: int, max_model_len: int) -> None:
        self.config = load_model_config(str(path))
        head_dim = self.config.head_dim
        attention, self.attention = choose_attention(DEVICE, DTYPE, head_dim, BLOCK_SIZE)
        tp = join_ranks(RANK_INFO, DEVICE)
        if tp.group is not None:
            tp = replace(tp, reduction=SymmetricReduction(tp.group, DEVICE))
        self.model = build_model(self.config, tp, DTYPE, DEVICE, attention)
        load_weights(self.model, str(path), "dummy", 0, lambda done, total: None)
        self.layout = self.config.kv_layout(BLOCK_SIZE, DTYPE.itemsize, tp.size, tp.rank)
        self.cache = KVCache(self.layout, max_tokens // BLOCK_SIZE, DTYPE, DEVICE)
        self.cache.blocks.normal_()
        self.slots = SamplingSlots(max_num_seqs, DEVICE)
        self.eager = Runner(self.model, self.cache, tp, max_num_seqs)
        torch.set_num_threads(1)  # as loading leaves it
        # Importing Triton initialises the device, so pick_device has to run before.
        from serve.engine.decode_graphs import DecodeGraphs

        self.graphs = DecodeGraphs(self.model, self.cache, self.eager.sampled, max_model_len)

    def step(self, batch: int, start: int, new: int) -> Step:
        """Plan ``batch`` sequences with ``new`` tokens after ``start``, over shuffled blocks."""
        count = self.layout.num_blocks_for(start + new)
        order = torch.randperm(self.cache.num_blocks)[: batch * count].view(batch, count).tolist()
        # Random tokens, because equal ones draw less power and so run faster than in service.
        tokens = torch.randint(self.config.vocab_size, (batch, new)).tolist()
        sequences = [
            StepSequence(start, tuple(ids), tuple(table), True)
            for ids, table in zip(tokens, order, strict=True)
        ]
        request = Request(id="random", prompt=pack_ids((0,)), sampling=SamplingParams(max_tokens=1))
        greedy = Request(
            id="greedy",
            prompt=pack_ids((0,)),
            sampling=SamplingParams(max_tokens=1, temperature=0.0),
        )
        rows = [SampleRow(request if i % 2 else greedy, 0) for i in range(batch)]
        return Step(tuple(sequences), tuple(rows))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path, help="directory with a config.json")
    parser.add_argument("--decode", nargs="*", default=DECODES, metavar="BATCHxCONTEXT")
    parser.add_argument("--prefill", nargs="*", default=PREFILLS, metavar="BATCHxLENGTH")
    parser.add_argument(
        "--profile", action="store_true", help="list the longest kernels of each step"
    )
    args = parser.parse_args()
    decodes, prefills = [_pair(text) for text in args.decode], [_pair(t) for t in args.prefill]
    max_tokens = max(batch * length for batch, length in [*decodes, *prefills]) + 1024 * BLOCK_SIZE
    max_model_len = max([length for _, length in decodes], default=BLOCK_SIZE) + BLOCK_SIZE
    max_num_seqs = max([batch for batch, _ in decodes], default=1)
    engine = Engine(args.model, max_tokens, max_num_seqs, max_model_len)
    engine.graphs.capture(lambda done, total: None, [batch for batch, _ in decodes])
    where = {"tp": RANK_INFO.world_size, "gpu": torch.cuda.get_device_name(DEVICE)}
    for batch, context in decodes:
        _print(_decode(engine, batch, context, args.profile) | where)
    for batch, length in prefills:
        _print(_prefill(engine, batch, length, args.profile) | where)
    if RANK_INFO.world_size > 1:
        dist.barrier()
        exit_now(0)  # the graphs hold the communicators


def _print(found: dict[str, Any]) -> None:
    if RANK_INFO.rank == 0:
        print(json.dumps(found), flush=True)


def _pair(text: str) -> tuple[int, int]:
    first, _, second = text.partition("x")
    return int(first), int(second)


def _decode(engine: Engine, batch: int, context: int, profile: bool) -> dict[str, Any]:
    step = engine.step(batch, context - 1, 1)

    def run() -> Tensor | None:
        return engine.graphs.run(step, engine.slots.place(step.rows))

    run()
    replay = partial(engine.graphs.replay, batch)
    step_ms, products_ms, copy_ms, with_fill_ms = _in_turn(
        replay, _products(engine.model, batch, batch), _copy(), run
    )
    kv_bytes = batch * context * engine.layout.block_bytes // BLOCK_SIZE
    kv_ms = copy_ms * kv_bytes / (2 * COPY_BYTES)
    floor_ms = products_ms + kv_ms
    found = {
        "decode": f"{batch}x{context}",
        "step_ms": step_ms,
        "with_fill_ms": with_fill_ms,
        "products_ms": products_ms,
        "kv_ms": kv_ms,
        "over_floor": step_ms / floor_ms,
        "copy_tb_s": 2 * COPY_BYTES / copy_ms / 1e9,
    }
    return found | ({"kernels": _kernels(run)} if profile else {})


def _prefill(engine: Engine, batch: int, length: int, profile: bool) -> dict[str, Any]:
    step = engine.step(batch, 0, length)
    run = partial(engine.eager.run, step)
    attention = _contiguous_attention(engine, batch, length)

    def attend() -> None:
        for _ in range(engine.config.num_layers):
            attention()

    twice_ms, from_idle_ms, products_ms, attention_ms = _in_turn(
        lambda: (run(), run()), run, _products(engine.model, batch * length, batch), attend
    )
    step_ms = twice_ms - from_idle_ms
    found = {
        "prefill": f"{batch}x{length}",
        "step_ms": step_ms,
        "from_idle_ms": from_idle_ms,
        "products_ms": products_ms,
        "attention_ms": attention_ms,
        "over_floor": step_ms / (products_ms + attention_ms),
    }
    return found | ({"kernels": _kernels(run)} if profile else {})


def _products(model: nn.Module, num_tokens: int, num_rows: int) -> Callable[[], None]:
    """Capture every matrix product of a forward pass as a CUDA graph; return its replay."""
    weights = list(_weights(model))
    inputs = {weight.shape[1]: torch.randn(num_tokens, weight.shape[1], dtype=DTYPE, device=DEVICE)
              for weight in weights}  # fmt: skip
    head: Tensor = model.lm_head.weight  # type: ignore[assignment, union-attr]
    states = torch.randn(num_rows, head.shape[1], dtype=DTYPE, device=DEVICE)

    def run() -> None:
        for weight in weights:
            functional.linear(inputs[weight.shape[1]], weight)
        functional.linear(states, head)

    run()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


def _weights(model: nn.Module) -> Iterator[Tensor]:
    for layer in model.model.layers:  # type: ignore[union-attr]
        yield layer.self_attn._qkv.weight
        yield layer.self_attn.o_proj.weight
        yield layer.mlp._gate_up.weight
        yield layer.mlp.down_proj.weight


def _contiguous_attention(engine: Engine, batch: int, length: int) -> Callable[[], None]:
    run = importlib.import_module("flash_attn.cute").flash_attn_func
    config, kv_heads = engine.config, len(engine.layout.kv_heads)
    num_heads = config.num_heads // config.num_kv_heads * kv_heads
    q = torch.randn(batch, length, num_heads, config.head_dim, dtype=DTYPE, device=DEVICE)
    k, v = torch.randn(2, batch, length, kv_heads, config.head_dim, dtype=DTYPE, device=DEVICE)
    return lambda: run(q, k, v, causal=True)


def _copy() -> Callable[[], Tensor]:
    """Return a copy within the device, which reads and writes ``COPY_BYTES``."""
    source = torch.empty(COPY_BYTES, dtype=torch.uint8, device=DEVICE)
    target = torch.empty_like(source)
    return lambda: target.copy_(source)


def _in_turn(*runs: Callable[[], object]) -> list[float]:
    """Run all in turn in every round; return the median time of each in milliseconds."""
    times: list[list[float]] = [[] for _ in runs]
    for number in range(NUM_ROUNDS + 1):
        for run, found in zip(runs, times, strict=True):
            start = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
            end = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
            start.record()
            run()
            end.record()
            torch.cuda.synchronize()
            if number > 0:  # the first one warms up
                found.append(start.elapsed_time(end))
    return [statistics.median(found) for found in times]


def _kernels(run: Callable[[], object]) -> list[tuple[str, int, float]]:
    """Return the kernels that took longest: name, calls, milliseconds."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
        run()
        torch.cuda.synchronize()
    events = sorted(profiler.key_averages(), key=lambda event: -event.self_device_time_total)
    return [(e.key[:70], e.count, e.self_device_time_total / 1e3) for e in events[:16]]


if __name__ == "__main__":
    main()
