"""Measure the rate of KV pushes, that of a plain send/recv, and the transfer time of requests.

    torchrun --standalone --nproc-per-node 2 -m bench.micro.kv_transfer MODEL [--prompt-tokens 8192]

MODEL is a directory with a config.json; its weights are random. Rank 0 prefills, rank 1 decodes.
Unknown options are passed to the server. Prints one JSON line: GB/s of plain sends and of pushes,
one alone and many in a row, for each transport, all of the same bytes in the same run; then the
stages of requests that were served one at a time.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist

from serve.comm.kv_transfer import Pair, packed_bytes
from serve.comm.process_groups import new_pair_groups
from serve.comm.symmetric import SymmetricArena, can_share_memory
from serve.comm.transports import P2PTransport, SymmetricTransport, Transport
from serve.config.server import ServerConfig, parse_args
from serve.kv.cache import KVCache
from serve.model.flash_attention import preferred_block_size
from serve.protocol.messages import NUM_STAGING_SLOTS
from serve.request import Request, SamplingParams, Timeline, pack_ids
from serve.runtime.join import join_job
from serve.runtime.rank import RankProcess
from serve.runtime.server import work_until_dismissed
from serve.runtime.shutdown import exit_now
from serve.runtime.startup import serving_front_end
from serve.topology import RankInfo, read_rank_info

NUM_ROUNDS = 10
NUM_IN_A_ROW = 16
PAIR = (0, 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path, help="directory with a config.json")
    parser.add_argument("--prompt-tokens", type=int, default=8192)
    parser.add_argument("--requests", type=int, default=8)
    args, server_options = parser.parse_known_args()
    rank_info = read_rank_info(os.environ)
    if rank_info.world_size != 2:
        parser.error("two ranks are needed: one that prefills and one that decodes")
    argv = ["--model", str(args.model), "--load-format", "dummy", "--tokenizer", "none"]
    argv += ["--max-model-len", str(args.prompt_tokens + 64)]
    config = parse_args([*argv, *server_options], 2)
    device, result = asyncio.run(_serve(config, rank_info, args))
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    block_size = config.block_size or preferred_block_size(device)
    layout = config.model_config.kv_layout(block_size, dtype.itemsize, 1, 0)
    cache = KVCache(layout, args.prompt_tokens // block_size, dtype, device)
    result |= _measure_links(cache, config.kv_push_bytes, rank_info, device)
    if rank_info.rank == 0:
        print(json.dumps(result), flush=True)
    dist.barrier()
    exit_now(0)


def _measure_links(
    cache: KVCache, push_bytes: int, rank_info: RankInfo, device: torch.device
) -> dict[str, Any]:
    backend: Literal["gloo", "nccl"] = "nccl" if device.type == "cuda" else "gloo"
    group = new_pair_groups([PAIR], backend)[PAIR]
    peer = 1 - rank_info.rank
    count = min(cache.num_blocks, max(1, push_bytes // cache.layout.block_bytes))
    num_bytes = count * packed_bytes(cache.blocks, len(cache.layout.kv_heads))
    found: dict[str, Any] = {"bytes": num_bytes}
    plain = P2PTransport(peer, group, num_bytes, device)
    found |= _measure_wire("plain", _Plain(plain, num_bytes), rank_info.rank, num_bytes, device)
    found |= _measure_wire("p2p", _push_end(cache, plain, count), rank_info.rank, num_bytes, device)
    if can_share_memory(rank_info, PAIR):
        arena = SymmetricArena(NUM_STAGING_SLOTS * num_bytes, device)
        end = _push_end(cache, SymmetricTransport(arena, peer, 0, 0, num_bytes), count)
        found |= _measure_wire("symm", end, rank_info.rank, num_bytes, device)
    return found


class _Plain:
    """Sends and receives bytes without packing."""

    def __init__(self, transport: Transport, num_bytes: int) -> None:
        self._transport, self._num_bytes = transport, num_bytes

    def send(self, slot: int) -> None:
        self._wait(self._transport.send(slot, self._num_bytes))

    def receive(self, slot: int) -> Callable[[], object]:
        wait = self._transport.receive(slot, self._num_bytes)
        return wait or (lambda: None)

    def unpack(self, slot: int) -> None:
        pass

    def _wait(self, wait: Callable[[], object] | None) -> None:
        if wait is not None:
            wait()


class _Push:
    """Packs, sends, receives and unpacks."""

    def __init__(self, pair: Pair, block_ids: torch.Tensor) -> None:
        self._pair, self._block_ids = pair, block_ids

    def send(self, slot: int) -> None:
        self._pair.send(slot, self._block_ids)

    def receive(self, slot: int) -> Callable[[], object]:
        return self._pair.receive(slot, len(self._block_ids))

    def unpack(self, slot: int) -> None:
        self._pair.unpack(slot, self._block_ids)


def _push_end(cache: KVCache, transport: Transport, count: int) -> _Push:
    heads = tuple(range(len(cache.layout.kv_heads)))
    block_ids = torch.randperm(cache.num_blocks, device=cache.blocks.device)[:count]
    return _Push(Pair(cache.blocks, heads, transport), block_ids)


def _measure_wire(
    name: str, end: _Plain | _Push, rank: int, num_bytes: int, device: torch.device
) -> dict[str, float]:
    def send(count: int) -> None:
        for number in range(count):
            end.send(number % NUM_STAGING_SLOTS)

    def receive(count: int) -> None:
        """Post each receive before waiting for the one before it, as in serving."""
        waits = [end.receive(number) for number in range(min(count, NUM_STAGING_SLOTS))]
        for number in range(count):
            slot = number % NUM_STAGING_SLOTS
            waits[slot]()
            end.unpack(slot)
            if number + NUM_STAGING_SLOTS < count:
                waits[slot] = end.receive(slot)

    run = send if rank == 0 else receive
    return {
        f"{name}_gb_s": _rate(lambda: run(1), num_bytes, device),
        f"{name}_in_a_row_gb_s": _rate(lambda: run(NUM_IN_A_ROW), num_bytes * NUM_IN_A_ROW, device),
    }


def _rate(run: Callable[[], None], num_bytes: int, device: torch.device) -> float:
    """Return the GB/s of the median round. Barriers start and end a round on both ranks."""
    seconds = []
    for _ in range(NUM_ROUNDS + 2):
        dist.barrier()
        start = time.perf_counter()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        dist.barrier()
        seconds.append(time.perf_counter() - start)
    return num_bytes / statistics.median(seconds[2:]) / 1e9


async def _serve(
    config: ServerConfig, rank_info: RankInfo, args: argparse.Namespace
) -> tuple[torch.device, dict[str, Any]]:
    """Serve requests one at a time; return this rank's device, and on rank 0 the stages."""
    timelines: list[Timeline] = []
    process = join_job(config, rank_info)
    if process.is_front_end:
        await _ask(process, args, timelines)
    else:
        await work_until_dismissed(process)
    return process.setup.device, _summarise(timelines) if timelines else {}


async def _ask(process: RankProcess, args: argparse.Namespace, timelines: list[Timeline]) -> None:
    vocab_size = process.config.model_config.vocab_size
    async with serving_front_end(process) as front_end:
        await front_end.get_ready()
        for i in range(args.requests + 1):
            prompt = tuple((i * 7919 + j * 31) % vocab_size for j in range(args.prompt_tokens))
            sampling = SamplingParams(max_tokens=16, temperature=0.0, ignore_eos=True)
            request = Request(id=f"r{i}", prompt=pack_ids(prompt), sampling=sampling)
            async for output in front_end.service.submit([request])[0]:
                if output.timeline is not None and i > 0:  # the first one warms up
                    timelines.append(output.timeline)


def _summarise(timelines: list[Timeline]) -> dict[str, Any]:
    def median(start: str, end: str) -> float:
        spans: list[float] = [getattr(t, end) - getattr(t, start) for t in timelines]
        return statistics.median(spans)

    return {
        "requests": len(timelines),
        "prefill_s": median("prefill_started_s", "prefill_ended_s"),
        "transfer_s": median("transfer_started_s", "transfer_ended_s"),
        "exposed_transfer_s": median("prefill_ended_s", "decode_queued_s"),
        "e2e_s": median("arrived_s", "finished_s"),
        "exposed_over_prefill": median("prefill_ended_s", "decode_queued_s")
        / median("prefill_started_s", "prefill_ended_s"),
    }


if __name__ == "__main__":
    main()
