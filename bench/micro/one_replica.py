"""One replica: joins all ranks of a job into one replica, for measurements without a server."""

from __future__ import annotations

import torch

from serve.comm.process_groups import init_world, new_tp_groups
from serve.comm.tensor_parallel import TensorParallel
from serve.topology import RankInfo, ReplicaSpec, build_topology


def join_ranks(rank_info: RankInfo, device: torch.device) -> TensorParallel:
    """Join this rank to the replica. Sums over ranks go through NCCL, or gloo on CPUs."""
    if rank_info.world_size == 1:
        return TensorParallel(0, 1)
    on_gpu = device.type == "cuda"
    init_world(rank_info, "cuda" if on_gpu else "cpu")
    topology = build_topology((ReplicaSpec(rank_info.world_size),), 0, mixed=True)
    group = new_tp_groups(topology, "nccl" if on_gpu else "gloo")
    return TensorParallel(rank_info.rank, rank_info.world_size, group)
