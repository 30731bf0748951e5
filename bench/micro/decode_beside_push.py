"""Measure how much arriving KV slows the decode steps that run at the same time.

    torchrun --standalone --nproc-per-node 2 -m bench.micro.decode_beside_push MODEL_DIRECTORY
        [--sequences 64] [--context 4096] [--push-gb-s 12] [--steps 300] [--kv-transport p2p|symm]

The weights are random. Rank 1 decodes and prepares each step while the one before it runs. Rank 0
pushes KV to it as in serving. Prints one JSON object: the time of a step on the device, and from
one step's end to the next (ITL, unpacking included), in four phases of one run:

    undisturbed   no push
    paced         pushes come at --push-gb-s; each is unpacked between two steps after it has come
    saturated     as paced, but the next push is requested as soon as a slot is free
    on_wire       there is always a push on the wire; its data is dropped, not unpacked
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import os
import sys
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from serve.comm.kv_transfer import Pair, packed_bytes
from serve.comm.process_groups import init_world, new_pair_groups
from serve.comm.symmetric import SymmetricArena, can_share_memory
from serve.comm.tensor_parallel import TensorParallel
from serve.comm.transports import P2PTransport, SymmetricTransport, Transport, Wait
from serve.config.options import KV_PUSH_BYTES
from serve.device import pick_device
from serve.engine.runner import Runner
from serve.kv.cache import KVCache
from serve.model.flash_attention import choose_attention, preferred_block_size
from serve.model.registry import build_model
from serve.model.weights.load import load_weights
from serve.model_config.file import load_model_config
from serve.model_config.kv_layout import num_blocks_for
from serve.protocol.messages import NUM_STAGING_SLOTS
from serve.protocol.plan import SampleRow, Step, StepSequence
from serve.request import Request, SamplingParams, pack_ids
from serve.runtime.join import SWITCH_INTERVAL_S
from serve.runtime.shutdown import exit_now
from serve.topology import read_rank_info

SENDER, DECODER = PAIR = (0, 1)
WARM_UPS = 10  # steps before the measured ones
ON_WIRE_DEPTH = 64  # pushes requested at once: more than the link carries in two steps
_END = -1  # sent in place of a push's number


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path, help="directory with a config.json")
    parser.add_argument("--sequences", type=int, default=64)
    parser.add_argument("--context", type=int, default=4096, help="tokens of each sequence")
    parser.add_argument("--push-gb-s", type=float, default=12.0, help="rate of the paced phase")
    parser.add_argument("--push-bytes", type=int, default=KV_PUSH_BYTES, help="size of a push")
    parser.add_argument("--steps", type=int, default=300, help="steps of each phase")
    parser.add_argument("--kv-transport", choices=("p2p", "symm"), default="p2p")
    args = parser.parse_args(argv)
    rank_info = read_rank_info(os.environ)
    if rank_info.world_size != 2:
        parser.error("two ranks are needed: one that pushes and one that decodes")
    sys.setswitchinterval(SWITCH_INTERVAL_S)
    device = pick_device(rank_info.local_rank)
    if args.kv_transport == "symm" and not can_share_memory(rank_info, PAIR):
        parser.error("symm needs two GPUs of one host that can read each other's memory")
    init_world(rank_info, "cuda" if device.type == "cuda" else "cpu")
    (_push_on_request if rank_info.rank == SENDER else _decode)(args, device)
    dist.barrier()
    exit_now(0)


class _End:
    """One rank's end of the link; both must be made at once. Its cache has room for one push."""

    def __init__(self, args: argparse.Namespace, device: torch.device, num_blocks: int) -> None:
        self.config = load_model_config(str(args.model))
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        layout = self.config.kv_layout(preferred_block_size(device), dtype.itemsize, 1, 0)
        count = max(1, args.push_bytes // layout.block_bytes)
        self.cache = KVCache(layout, num_blocks + count, dtype, device)
        self.cache.blocks.normal_()
        self.ids = torch.randperm(count, device=device) + num_blocks  # block ids of a push, int64
        self.push_bytes: int = count * packed_bytes(self.cache.blocks, len(layout.kv_heads))
        sends = dist.get_rank() == SENDER
        self.transport = self._make_wire(args.kv_transport, DECODER if sends else SENDER, device)
        self.transport.warm_up(sending=sends)
        self.pair = Pair(self.cache.blocks, tuple(range(len(layout.kv_heads))), self.transport)

    def _make_wire(self, transport: str, peer: int, device: torch.device) -> Transport:
        if transport == "symm":
            arena = SymmetricArena(NUM_STAGING_SLOTS * self.push_bytes, device)
            return SymmetricTransport(arena, peer, 0, 0, self.push_bytes)
        group = new_pair_groups([PAIR], "nccl" if device.type == "cuda" else "gloo")[PAIR]
        return P2PTransport(peer, group, self.push_bytes, device)


def _push_on_request(args: argparse.Namespace, device: torch.device) -> None:
    """Run rank 0: send a push for each push number that rank 1 sends."""
    end = _End(args, device, 0)
    number = torch.zeros(1, dtype=torch.int64)
    while True:
        dist.recv(number, DECODER)
        if (push := int(number.item())) == _END:
            break
        end.pair.send(push % NUM_STAGING_SLOTS, end.ids)


class _Inbox:
    """Requests and receives pushes on rank 1."""

    def __init__(self, end: _End, device: torch.device) -> None:
        self._end = end
        self.push_bytes = end.push_bytes
        self._drops = torch.cuda.Stream() if device.type == "cuda" else None  # type: ignore[no-untyped-call]
        self._waiter = ThreadPoolExecutor(1, thread_name_prefix="waiter")
        # Of each requested push: its slot, whether to unpack it, and the wait for its data.
        self.coming: deque[tuple[int, bool, Future[object]]] = deque()
        self._requested: list[object] = []  # push numbers, kept until their sends are complete

    def request(self, *, unpack: bool) -> None:
        """Request one more push, to be unpacked or dropped. Call this in the decoding thread."""
        slot = len(self._requested) % NUM_STAGING_SLOTS
        number = torch.tensor([len(self._requested)])
        self._requested.append((number, dist.isend(number, SENDER)))
        wait = self._end.pair.receive(slot, len(self._end.ids)) if unpack else self._drop(slot)
        self.coming.append((slot, unpack, self._waiter.submit(wait)))

    def take(self, *, wait: bool = False) -> int:
        """Unpack the pushes that have come (``wait``: all requested ones); return their number."""
        before = len(self.coming)
        while self.coming and (wait or self.coming[0][2].done()):
            slot, unpack, received = self.coming.popleft()
            received.result()
            if unpack:
                self._end.pair.unpack(slot, self._end.ids)
        return before - len(self.coming)

    def _drop(self, slot: int) -> Wait:
        """Receive into ``slot`` and free it as soon as the data has come."""
        with nullcontext() if self._drops is None else torch.cuda.stream(self._drops):
            wait = self._end.transport.receive(slot, self._end.push_bytes)
            self._end.transport.release(slot)
            if wait is not None:
                return wait
            done = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
            done.record()
            return done.synchronize


@dataclass(frozen=True, slots=True)
class Times:
    """One phase: the times of its steps [ms], and the pushes that came meanwhile."""

    step_ms: list[float]
    itl_ms: list[float]
    num_pushes: int
    gb_s: float  # rate of these pushes


def _decode(args: argparse.Namespace, device: torch.device) -> None:
    blocks_each = num_blocks_for(args.context, preferred_block_size(device))
    end = _End(args, device, args.sequences * blocks_each)
    inbox = _Inbox(end, device)
    runner = _make_runner(args, end, device)
    step = _step(args.sequences, args.context, blocks_each)
    for unpack in (True, False):  # warm-up, because the first push of each kind is slow
        inbox.request(unpack=unpack)
        inbox.take(wait=True)

    def measure(bytes_per_s: float, depth: int, *, unpack: bool) -> Times:
        clock = _Clock(device, lambda: runner.run(step))
        return _measure(clock, args.steps, inbox, bytes_per_s, depth, unpack)

    undisturbed = measure(0.0, 0, unpack=False)
    paced = measure(args.push_gb_s * 1e9, NUM_STAGING_SLOTS, unpack=True)
    saturated = measure(math.inf, NUM_STAGING_SLOTS, unpack=True)
    on_wire = measure(math.inf, ON_WIRE_DEPTH, unpack=False)
    dist.send(torch.tensor([_END]), SENDER)
    phases = {"undisturbed": undisturbed, "paced": paced}
    phases |= {"saturated": saturated, "on_wire": on_wire}
    options = {n: getattr(args, n) for n in ("sequences", "context", "steps", "kv_transport")}
    print(json.dumps(options | {"push_bytes": end.push_bytes} | summarise(phases)), flush=True)


def _step(num_sequences: int, context: int, blocks_each: int) -> Step:
    """Plan one token for each sequence, at the end of its context, over shuffled blocks."""
    order = torch.randperm(num_sequences * blocks_each).view(num_sequences, -1).tolist()
    sequences = tuple(StepSequence(context - 1, (7,), tuple(table), True) for table in order)
    sampling = [SamplingParams(max_tokens=1, temperature=float(i % 2)) for i in range(2)]
    requests = [
        Request(id=str(i), prompt=pack_ids((0,)), sampling=one) for i, one in enumerate(sampling)
    ]
    return Step(sequences, tuple(SampleRow(requests[i % 2], 0) for i in range(num_sequences)))


def _make_runner(args: argparse.Namespace, end: _End, device: torch.device) -> Runner:
    """Build the model as in serving: on a GPU its steps are CUDA graphs."""
    config, cache, tp = end.config, end.cache, TensorParallel(0, 1)
    dtype, block_size = cache.blocks.dtype, cache.layout.block_size
    attention, _ = choose_attention(device, dtype, config.head_dim, block_size)
    model = build_model(config, tp, dtype, device, attention)
    load_weights(model, str(args.model), "dummy", 0, lambda done, total: None)
    runner = Runner(model.eval(), cache, tp, args.sequences)
    if device.type == "cuda":
        from serve.engine.decode_graphs import DecodeGraphs  # needs Triton, so GPUs only

        graphs = DecodeGraphs(model, cache, runner.sampled, args.context + block_size)
        graphs.capture(lambda done, total: None, [args.sequences])
        runner.use_graphs(graphs)
    return runner


def _measure(
    clock: _Clock, num_steps: int, inbox: _Inbox, bytes_per_s: float, depth: int, unpack: bool
) -> Times:
    """Run ``num_steps`` steps with ``bytes_per_s`` of pushes, at most ``depth`` in flight."""
    started_s = time.perf_counter()
    num_requested = num_pushes = 0
    for _ in range(WARM_UPS + num_steps):
        num_pushes += inbox.take()
        due = bytes_per_s * (time.perf_counter() - started_s) / inbox.push_bytes
        while len(inbox.coming) < depth and num_requested < due:
            inbox.request(unpack=unpack)
            num_requested += 1
        clock.step()
    clock.finish()
    num_pushes += inbox.take()
    gb_s = num_pushes * inbox.push_bytes / (time.perf_counter() - started_s) / 1e9
    inbox.take(wait=True)
    return Times(clock.step_ms()[WARM_UPS:], clock.itl_ms()[WARM_UPS - 1 :], num_pushes, gb_s)


class _Clock:
    """Runs and times steps, with events on a GPU. The host is at most one step ahead of the GPU."""

    def __init__(self, device: torch.device, run: Callable[[], object]) -> None:
        self._on_gpu, self._run = device.type == "cuda", run
        self._starts: list[Any] = []  # events on a GPU, else seconds
        self._ends: list[Any] = []

    def step(self) -> None:
        """Issue a step, and wait for the one before it."""
        self._starts.append(self._mark())
        self._run()
        end = self._mark()
        self.finish()
        self._ends.append(end)

    def finish(self) -> None:
        """Wait for the last step."""
        if self._on_gpu and self._ends:
            self._ends[-1].synchronize()

    def step_ms(self) -> list[float]:
        return [self._ms(*marks) for marks in zip(self._starts, self._ends, strict=True)]

    def itl_ms(self) -> list[float]:
        """Return the times from each step's end to the end of the next."""
        return [self._ms(*marks) for marks in itertools.pairwise(self._ends)]

    def _mark(self) -> object:
        if not self._on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True, blocking=True)  # type: ignore[no-untyped-call]
        event.record()
        return event

    def _ms(self, start: Any, end: Any) -> float:
        return float(start.elapsed_time(end) if self._on_gpu else (end - start) * 1e3)


def summarise(phases: dict[str, Times]) -> dict[str, Any]:
    """Return P50 and P99 of each phase, and the ratios of their ITL to ``undisturbed``."""
    found: dict[str, Any] = {}
    for name, times in phases.items():
        for kind, values in (("step", times.step_ms), ("itl", times.itl_ms)):
            p50, p99 = np.percentile(values, (50, 99))
            found |= {f"{name}_{kind}_p50_ms": float(p50), f"{name}_{kind}_p99_ms": float(p99)}
        if name == "undisturbed":
            continue
        found |= {f"{name}_gb_s": times.gb_s, f"{name}_pushes": times.num_pushes}
        for q in ("p50", "p99"):
            over = found[f"{name}_itl_{q}_ms"] / found[f"undisturbed_itl_{q}_ms"]
            found[f"{name}_over_undisturbed_{q}"] = over
    return found


if __name__ == "__main__":
    main()
