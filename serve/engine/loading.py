"""Loads a rank: process groups, weights, KV memory and transports, from its configuration.

Runs once, in the GPU thread. All ranks run the same collective operations in the same order.
"""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import nn
from tqdm import tqdm

from serve.comm.kv_transfer import KVReceiver, KVSender, Pair
from serve.comm.process_groups import Backend, new_pair_groups, new_tp_groups
from serve.comm.symmetric import SymmetricArena, SymmetricReduction, can_share_memory
from serve.comm.tensor_parallel import TensorParallel
from serve.comm.transports import P2PTransport, SymmetricTransport, Transport
from serve.engine.executor import RankResources
from serve.engine.memory import (
    make_graphs,
    measure_num_blocks,
    uses_graphs,
)
from serve.engine.rank_setup import RankSetup
from serve.engine.runner import Runner
from serve.engine.warm_up import load_kernels, reserve_memory
from serve.kv.cache import KVCache
from serve.model.flash_attention import choose_attention
from serve.model.registry import build_model
from serve.model.weights.load import load_weights
from serve.protocol.messages import NUM_STAGING_SLOTS
from serve.protocol.transfer_plan import Slice, plan_transfer
from serve.topology import FRONT_END_RANK, ReplicaInfo

if TYPE_CHECKING:
    from serve.engine.decode_graphs import DecodeGraphs  # needs Triton, as GPUs do

log = logging.getLogger(__name__)

Progress = Callable[[int, int], None]


@dataclass(frozen=True, slots=True)
class Loaded:
    """A rank that is ready: its resources, and the number of its replica's KV blocks."""

    resources: RankResources
    num_blocks: int


@dataclass(frozen=True, slots=True)
class Route:
    """One directed pair of ranks and the heads that one sends to the other."""

    prefill: ReplicaInfo
    decode: ReplicaInfo
    slice: Slice

    @property
    def ranks(self) -> tuple[int, int]:
        """Sender and receiver."""
        return self.prefill.ranks[self.slice.src], self.decode.ranks[self.slice.dst]


def load_rank(setup: RankSetup, progress: Progress) -> Loaded:
    """Load this rank's share of the model and connect it to its peers.

    ``progress(done, total)`` is called as weights are loaded. Raises ``ValueError`` with one line
    if the checkpoint or the memory settings cannot be served.
    """
    try:
        return _load_rank(setup, progress)
    except torch.OutOfMemoryError as error:
        reason = ". ".join(str(error).split(". ")[:2])
        raise ValueError(
            f"rank {setup.rank_info.rank}: {setup.device} is too small for its part: {reason}. "
            "Give replicas more ranks (--replica-spec), or lower --max-num-batched-tokens, "
            "--max-num-seqs or --kv-push-bytes"
        ) from error


def _load_rank(setup: RankSetup, progress: Progress) -> Loaded:
    backend: Backend = "nccl" if setup.device.type == "cuda" else "gloo"
    routes = find_routes(setup)
    _check_transport(setup, routes)
    group = new_tp_groups(setup.topology, backend)
    pair_groups = new_pair_groups([route.ranks for route in routes], backend)
    transports = _connect(setup, routes, pair_groups)
    tp = _make_tensor_parallel(setup, group)
    model = _load_model(setup, tp, progress)
    if setup.device.type == "cuda":
        load_kernels(setup, model, tp)
    measured = measure_num_blocks(setup, model, tp)
    num_blocks = _agree_on_num_blocks(measured, group, setup.device)
    cache = KVCache(setup.layout, num_blocks, setup.dtype, setup.device)
    sender, receiver = _make_transfers(setup, cache, routes, transports)
    runner = Runner(model, cache, tp, setup.limits.max_num_seqs)
    if uses_graphs(setup):
        graphs = make_graphs(setup, model, cache, runner.sampled)
        _capture_graphs(setup, graphs)
        runner.use_graphs(graphs)
    if setup.device.type == "cuda":
        reserve_memory(setup, runner, cache)
        # The CPU only does each step's index arithmetic. Divided among all cores, it would wait for
        # the busiest core. The setting also applies to threads that start later.
        torch.set_num_threads(1)
    return Loaded(RankResources(runner, sender, receiver), num_blocks)


def find_routes(setup: RankSetup) -> list[Route]:
    """Return every directed pair of ranks that exchanges KV, in the same order on all ranks."""
    return [
        Route(prefill, decode, part)
        for prefill, decode in setup.topology.links()
        for part in plan_transfer(setup.layouts(prefill), setup.layouts(decode))
    ]


def _check_transport(setup: RankSetup, routes: list[Route]) -> None:
    """Raise ``ValueError``, on all ranks, if the option needs memory that GPUs cannot share."""
    if setup.config.kv_transport == "symm":
        ranks = {rank for route in routes for rank in route.ranks}
        if not can_share_memory(setup.rank_info, sorted(ranks)):
            raise ValueError(
                "--kv-transport symm needs GPUs of one host that can read each other's memory"
            )


def _own_routes(setup: RankSetup, routes: list[Route]) -> list[Route]:
    return [route for route in routes if setup.rank_info.rank in route.ranks]


def _make_tensor_parallel(setup: RankSetup, group: dist.ProcessGroup | None) -> TensorParallel:
    reduction = None
    if (
        group is not None
        and setup.dtype is torch.bfloat16
        and can_share_memory(setup.rank_info, setup.replica.ranks)
    ):
        reduction = SymmetricReduction(group, setup.device)
    tp_rank = setup.topology.tp_rank(setup.rank_info.rank)
    return TensorParallel(tp_rank, setup.replica.tp, group, reduction)


def _connect(
    setup: RankSetup, routes: list[Route], groups: Mapping[tuple[int, int], dist.ProcessGroup]
) -> dict[tuple[int, int], Transport]:
    """Make and warm up the transports of this rank's pairs, in the same order on all ranks."""
    make = _symmetric_transports if setup.config.kv_transport == "symm" else _p2p_transports
    transports = make(setup, routes, groups)
    for (source, _), transport in transports.items():
        transport.warm_up(sending=setup.rank_info.rank == source)
    return transports


def _p2p_transports(
    setup: RankSetup, routes: list[Route], groups: Mapping[tuple[int, int], dist.ProcessGroup]
) -> dict[tuple[int, int], Transport]:
    return {
        route.ranks: P2PTransport(
            _peer(setup, route), groups[route.ranks], _slot_bytes(setup, route), setup.device
        )
        for route in _own_routes(setup, routes)
    }


def _symmetric_transports(
    setup: RankSetup, routes: list[Route], groups: Mapping[tuple[int, int], dist.ProcessGroup]
) -> dict[tuple[int, int], Transport]:
    """Place the slots of all pairs in one arena. Every rank computes the offsets at all ranks."""
    sizes: dict[int, int] = dict.fromkeys(range(setup.rank_info.world_size), 0)
    offsets: dict[tuple[int, tuple[int, int]], int] = {}
    for route in routes:
        for rank in route.ranks:
            offsets[rank, route.ranks] = sizes[rank]
            sizes[rank] += NUM_STAGING_SLOTS * _slot_bytes(setup, route)
    arena = SymmetricArena(max(sizes.values()), setup.device)
    transports: dict[tuple[int, int], Transport] = {}
    for route in _own_routes(setup, routes):
        peer = _peer(setup, route)
        own_offset = offsets[setup.rank_info.rank, route.ranks]
        peer_offset = offsets[peer, route.ranks]
        transports[route.ranks] = SymmetricTransport(
            arena, peer, own_offset, peer_offset, _slot_bytes(setup, route)
        )
    return transports


def _peer(setup: RankSetup, route: Route) -> int:
    source, target = route.ranks
    return target if setup.rank_info.rank == source else source


def _slot_bytes(setup: RankSetup, route: Route) -> int:
    """Return the bytes of the largest push between the two ranks."""
    layout = setup.layouts(route.prefill)[route.slice.src]
    num_heads = len(route.slice.src_heads)
    return setup.max_push_blocks * layout.block_bytes * num_heads // len(layout.kv_heads)


def _load_model(setup: RankSetup, tp: TensorParallel, progress: Progress) -> nn.Module:
    config = setup.config
    head_dim = config.model_config.head_dim
    attention, name = choose_attention(setup.device, setup.dtype, head_dim, setup.block_size)
    log.info("rank %d: %s, attention by %s", setup.rank_info.rank, setup.dtype, name)
    model = build_model(config.model_config, tp, setup.dtype, setup.device, attention)
    load_weights(model, config.model, config.load_format, config.seed, progress)
    return model.eval()


def _capture_graphs(setup: RankSetup, graphs: DecodeGraphs) -> None:
    begun_s = time.monotonic()
    hidden = setup.rank_info.rank != FRONT_END_RANK or not sys.stderr.isatty()
    with tqdm(desc="CUDA graphs", disable=hidden) as bar:

        def progress(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        graphs.capture(progress)
    log.info("rank %d: CUDA graphs in %.1f s", setup.rank_info.rank, time.monotonic() - begun_s)


def _agree_on_num_blocks(
    num_blocks: int, group: dist.ProcessGroup | None, device: torch.device
) -> int:
    """Return the smallest count of the replica's ranks, because they share one block table."""
    if group is None:
        return num_blocks
    smallest = torch.tensor([num_blocks], device=device)
    dist.all_reduce(smallest, dist.ReduceOp.MIN, group=group)
    return int(smallest.item())


def _make_transfers(
    setup: RankSetup,
    cache: KVCache,
    routes: list[Route],
    transports: Mapping[tuple[int, int], Transport],
) -> tuple[KVSender, KVReceiver]:
    outgoing: dict[int, list[Pair]] = {}
    incoming: dict[int, list[Pair]] = {}
    for route in _own_routes(setup, routes):
        transport = transports[route.ranks]
        if setup.rank_info.rank == route.ranks[0]:
            pair = Pair(cache.blocks, route.slice.src_heads, transport)
            outgoing.setdefault(route.decode.id, []).append(pair)
        else:
            pair = Pair(cache.blocks, route.slice.dst_heads, transport)
            incoming.setdefault(route.prefill.id, []).append(pair)
        pair.warm_up()
    return KVSender(outgoing, setup.device), KVReceiver(incoming, setup.device)
