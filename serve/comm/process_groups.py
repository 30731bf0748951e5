"""The job's process groups: who is in each, on which backend, and in which order they are made.

Making a group is a collective of all ranks: every rank makes every group, its own and others', in
one order. No group has a time-out: a gloo connection whose wait has timed out stays closed for
good, and a wait may be long without anything being wrong (an idle peer, a slow disk). What does not
answer is found by heartbeats instead.

What gloo promises to threads: a send or receive takes the connection's lock, and is matched with
its counterpart by (peer, direction, tag) in the order of issue. So any number of threads may use
one group at once as long as each (peer, direction, tag) belongs to one thread, and a receive names
its source.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta
from typing import Literal

import torch.distributed as dist

from serve.topology import RankInfo, Topology

Backend = Literal["gloo", "nccl"]

NO_TIMEOUT = timedelta(days=365)


def init_world(rank_info: RankInfo, device: Literal["cpu", "cuda"]) -> None:
    """Join the other ranks of the job, which torchrun's environment says how to reach.

    The world's own group is gloo; groups for GPU tensors are made later, on NCCL. Raises
    ``RuntimeError`` if ``device`` needs what this torch was built without.
    """
    if device == "cuda" and not dist.is_nccl_available():
        raise RuntimeError("this build of torch has CUDA but no NCCL")
    # Alone there is nobody to meet, and perhaps no torchrun that has said where.
    store = dist.HashStore() if rank_info.world_size == 1 else None  # type: ignore[attr-defined]
    dist.init_process_group(
        "gloo",
        store=store,
        rank=rank_info.rank,
        world_size=rank_info.world_size,
        timeout=NO_TIMEOUT,
    )


def new_control_group() -> dist.ProcessGroup:
    """A gloo group of all ranks for the control channel alone."""
    return _new_group(range(dist.get_world_size()), "gloo")


def new_tp_groups(topology: Topology, backend: Backend) -> dist.ProcessGroup | None:
    """The group of the ranks that share this rank's layers; None where tp is 1."""
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
    """A group for each directed pair ``(source, target)``; returns those this rank is in.

    ``ValueError`` for a pair that is given twice or that is one rank.
    """
    if len(set(pairs)) < len(pairs) or any(source == target for source, target in pairs):
        raise ValueError(f"pairs of two ranks, each once, are wanted; got {list(pairs)}")
    groups = {pair: _new_group(pair, backend) for pair in pairs}
    return {pair: group for pair, group in groups.items() if dist.get_rank() in pair}


def _new_group(ranks: Sequence[int], backend: Backend) -> dist.ProcessGroup:
    group: dist.ProcessGroup = dist.new_group(list(ranks), timeout=NO_TIMEOUT, backend=backend)
    return group
