"""From a configuration to a rank that can carry out entries: groups, weights, memory, links.

Runs once, in the GPU thread. All ranks go through the same collective steps in the same order.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import nn

from serve.comm.kv_transfer import KVReceiver, KVSender, Pair, warm_up
from serve.comm.process_groups import Backend, new_pair_groups, new_tp_groups
from serve.comm.tensor_parallel import TensorParallel
from serve.comm.topology import Place, ReplicaInfo, Topology
from serve.comm.transfer_plan import Slice, plan_transfer
from serve.config import PhaseLimits, Role, ServerConfig
from serve.engine.executor import Equipment
from serve.engine.kv_cache import KVCache
from serve.engine.kv_layout import KVLayout
from serve.engine.memory import measure_num_blocks
from serve.engine.runner import Runner
from serve.model.registry import build_model
from serve.model.weights import load_weights

Progress = Callable[[int, int], None]

CPU_BLOCK_SIZE = 16
GPU_BLOCK_SIZE = 64


@dataclass(frozen=True, slots=True)
class Loaded:
    """A rank that is ready: what it works with, and how many KV blocks its replica has."""

    equipment: Equipment
    num_blocks: int


@dataclass(frozen=True, slots=True)
class Plan:
    """What can be said of every rank before anything is loaded."""

    config: ServerConfig
    topology: Topology
    place: Place
    device: torch.device

    @property
    def replica(self) -> ReplicaInfo:
        """This rank's replica."""
        return self.topology.replica_of(self.place.rank)

    @property
    def limits(self) -> PhaseLimits:
        """What this rank's replica may take on."""
        return limits_of(self.config, self.replica.role)

    @property
    def dtype(self) -> torch.dtype:
        """Of weights, activations and KV: float32 on CPU, the checkpoint's own on GPU."""
        name: str = self.config.dtype
        if name == "auto":
            name = "float32" if self.device.type == "cpu" else self.config.model_config.dtype
        dtype: torch.dtype = getattr(torch, name)
        return dtype

    @property
    def block_size(self) -> int:
        """Tokens in a block."""
        preferred = CPU_BLOCK_SIZE if self.device.type == "cpu" else GPU_BLOCK_SIZE
        return self.config.block_size or preferred

    def layouts(self, replica: ReplicaInfo) -> tuple[KVLayout, ...]:
        """The KV layout of each tp rank of a replica."""
        model = self.config.model_config
        size = self.dtype.itemsize
        return tuple(
            model.kv_layout(self.block_size, size, replica.tp, tp_rank)
            for tp_rank in range(replica.tp)
        )

    @property
    def max_push_blocks(self) -> int:
        """Blocks in the largest push: ``kv_push_bytes``, at least one, at most a whole context."""
        config = self.config
        layout = config.model_config.kv_layout(self.block_size, self.dtype.itemsize, 1, 0)
        context = config.max_model_len or config.model_config.max_position_embeddings
        wanted = config.kv_push_bytes // layout.block_bytes
        return max(1, min(wanted, layout.num_blocks_for(context)))


@dataclass(frozen=True, slots=True)
class Route:
    """One directed pair of ranks and the heads that travel on it."""

    prefill: ReplicaInfo
    decode: ReplicaInfo
    slice: Slice

    @property
    def ranks(self) -> tuple[int, int]:
        """Sender and receiver."""
        return self.prefill.ranks[self.slice.src], self.decode.ranks[self.slice.dst]


def limits_of(config: ServerConfig, role: Role) -> PhaseLimits:
    """A replica that only prefills has limits of its own; all others have decode's."""
    return config.prefill if role is Role.PREFILL else config.decode


def load_rank(plan: Plan, progress: Progress) -> Loaded:
    """Load this rank's share of the model and connect it. ``progress(done, total)``: weights.

    Raises ``ValueError`` with one line for a checkpoint or a memory setting that cannot be served.
    """
    backend: Backend = "nccl" if plan.device.type == "cuda" else "gloo"
    group = new_tp_groups(plan.topology, backend)
    tp = TensorParallel(plan.topology.tp_rank(plan.place.rank), plan.replica.tp, group)
    routes = find_routes(plan)
    groups = _connect(plan, routes, backend)
    model = _load_model(plan, tp, progress)
    staging_bytes = sum(_staging_bytes(plan, route) for route in _own(plan, routes))
    num_blocks = _agree(measure_num_blocks(plan, model, staging_bytes), group, plan.device)
    layout = plan.layouts(plan.replica)[tp.rank]
    cache = KVCache(layout, num_blocks, plan.dtype, plan.device)
    sender, receiver = _make_transfers(plan, routes, groups, cache)
    return Loaded(Equipment(Runner(model, cache, plan.block_size), sender, receiver), num_blocks)


def find_routes(plan: Plan) -> list[Route]:
    """Every directed pair of ranks that exchanges KV, in one order on all ranks."""
    return [
        Route(prefill, decode, part)
        for prefill, decode in plan.topology.links()
        for part in plan_transfer(plan.layouts(prefill), plan.layouts(decode))
    ]


def _own(plan: Plan, routes: list[Route]) -> list[Route]:
    return [route for route in routes if plan.place.rank in route.ranks]


def _connect(
    plan: Plan, routes: list[Route], backend: Backend
) -> dict[tuple[int, int], dist.ProcessGroup]:
    """Make the communicator of every pair, and use each once, in one order everywhere."""
    groups = new_pair_groups([route.ranks for route in routes], backend)
    for source, target in (route.ranks for route in routes):
        if plan.place.rank == source:
            warm_up(groups[source, target], target, plan.device, sending=True)
        elif plan.place.rank == target:
            warm_up(groups[source, target], source, plan.device, sending=False)
    return groups


def _load_model(plan: Plan, tp: TensorParallel, progress: Progress) -> nn.Module:
    config = plan.config
    model = build_model(config.model_config, tp, plan.dtype, plan.device)
    load_weights(model, config.model, config.load_format, config.seed, progress)
    return model.eval()


def _staging_bytes(plan: Plan, route: Route) -> int:
    layout = plan.layouts(route.prefill)[route.slice.src]
    share = layout.block_bytes * len(route.slice.src_heads) // len(layout.kv_heads)
    return Pair.staging_bytes(share, plan.max_push_blocks)


def _agree(num_blocks: int, group: dist.ProcessGroup | None, device: torch.device) -> int:
    """The smallest count of the replica's ranks: they share one block table."""
    if group is None:
        return num_blocks
    smallest = torch.tensor([num_blocks], device=device)
    dist.all_reduce(smallest, dist.ReduceOp.MIN, group=group)
    return int(smallest.item())


def _make_transfers(
    plan: Plan,
    routes: list[Route],
    groups: dict[tuple[int, int], dist.ProcessGroup],
    cache: KVCache,
) -> tuple[KVSender, KVReceiver]:
    outgoing: dict[int, list[Pair]] = {}
    incoming: dict[int, list[Pair]] = {}
    for route in _own(plan, routes):
        source, target = route.ranks
        sends = plan.place.rank == source
        pair = Pair(
            cache.blocks,
            route.slice.src_heads if sends else route.slice.dst_heads,
            target if sends else source,
            groups[route.ranks],
            plan.max_push_blocks,
        )
        if sends:
            outgoing.setdefault(route.decode.id, []).append(pair)
        else:
            incoming.setdefault(route.prefill.id, []).append(pair)
    return KVSender(outgoing, plan.device), KVReceiver(incoming, plan.device)
