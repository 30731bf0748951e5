"""The job's process groups: their ranks, their backends and the order of their creation.

Creating a group is a collective of all ranks. Every rank creates every group in one order, also the
groups that it is not in. No group has a time-out, because a gloo connection stays closed for good
after a wait timed out, and a long wait can be normal (an idle peer, a slow disk). Heartbeats detect
a rank that does not respond.

Several threads may use one gloo group at once. A send or receive takes the connection's lock and is
matched with its counterpart by (peer, direction, tag) in the order of issue. So each (peer,
direction, tag) must belong to one thread, and a receive must name its source.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta
from typing import Literal

import torch.distributed as dist
from torch.distributed import Store  # type: ignore[attr-defined]

from serve.comm.rendezvous import open_store
from serve.topology import RankInfo, Topology

Backend = Literal["gloo", "nccl"]

NO_TIMEOUT = timedelta(days=365)
DEFAULT_START_TIMEOUT_S = 600.0


def init_world(
    rank_info: RankInfo, device: Literal["cpu", "cuda"], store: Store | None = None
) -> None:
    """Join the other ranks of the job at ``store``; by default one at ``rank_info.store``.

    The world group uses gloo. Groups for GPU tensors are created later, on NCCL. Raises
    ``RuntimeError`` if ``device`` is "cuda" and torch was built without NCCL, and ``StartError`` if
    the default store cannot be reached.
    """
    if device == "cuda" and not dist.is_nccl_available():
        raise RuntimeError("this build of torch has CUDA but no NCCL")
    dist.init_process_group(
        "gloo",
        store=store or open_store(rank_info, DEFAULT_START_TIMEOUT_S),
        rank=rank_info.rank,
        world_size=rank_info.world_size,
        timeout=NO_TIMEOUT,
    )


def new_control_group() -> dist.ProcessGroup:
    """Create a gloo group of all ranks that only the control channel uses."""
    return _new_group(range(dist.get_world_size()), "gloo")


def new_tp_groups(topology: Topology, backend: Backend) -> dist.ProcessGroup | None:
    """Create all tensor-parallel groups; returns this rank's, or None if its tp is 1."""
    own: dist.ProcessGroup | None = None
    for replica in topology.replicas:
        if replica.tp == 1:
            continue
        for first in range(0, len(replica.ranks), replica.tp):
            ranks = replica.ranks[first : first + replica.tp]
            group = _new_group(ranks, backend)
            if dist.get_rank() in ranks:
                own = group
    return own


def new_pair_groups(
    pairs: Sequence[tuple[int, int]], backend: Backend
) -> dict[tuple[int, int], dist.ProcessGroup]:
    """Create a group for each directed pair ``(source, target)``; returns those with this rank.

    Raises ``ValueError`` for a pair that is given twice or that has one rank only.
    """
    if len(set(pairs)) < len(pairs) or any(source == target for source, target in pairs):
        raise ValueError(f"expected pairs of two ranks, each once; got {list(pairs)}")
    groups = {pair: _new_group(pair, backend) for pair in pairs}
    return {pair: group for pair, group in groups.items() if dist.get_rank() in pair}


def _new_group(ranks: Sequence[int], backend: Backend) -> dist.ProcessGroup:
    group: dist.ProcessGroup = dist.new_group(list(ranks), timeout=NO_TIMEOUT, backend=backend)
    return group
