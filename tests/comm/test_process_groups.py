"""Process groups: their ranks, their creation without a deadlock, their use by several threads."""

from __future__ import annotations

import random
import subprocess
import sys
import threading

import pytest
import torch
import torch.distributed as dist

from serve.comm.process_groups import new_pair_groups, new_tp_groups
from serve.topology import ReplicaSpec, build_topology
from tests.support.world import World

MODULE = "tests.comm.test_process_groups"


def sum_within_replica(tps: list[int]) -> tuple[float, tuple[int, int] | None]:
    """Return the sum of the ranks in this rank's tp group, and its rank and size there."""
    topology = build_topology([ReplicaSpec(tp) for tp in tps], 0, True)
    group = new_tp_groups(topology, "gloo")
    rank = dist.get_rank()
    if group is None:
        return float(rank), None
    total = torch.tensor([float(rank)])
    dist.all_reduce(total, group=group)
    rank_info = dist.get_rank(group), dist.get_world_size(group)
    assert rank_info == (topology.tp_rank(rank), topology.replica_of(rank).tp)
    return total.item(), rank_info


@pytest.mark.parametrize(
    ("tps", "sums"),
    [
        ([1, 1, 1, 1], [0, 1, 2, 3]),
        ([1, 2, 1], [0, 3, 3, 3]),
        ([2, 2], [1, 1, 5, 5]),
        ([1, 3], [0, 6, 6, 6]),
    ],
)
def test_a_tp_group_has_the_ranks_of_its_replica(
    world: World, tps: list[int], sums: list[int]
) -> None:
    results = world.run(f"{MODULE}:sum_within_replica", tps)
    assert [total for total, _ in results] == sums
    replicas = build_topology([ReplicaSpec(tp) for tp in tps], 0, True).replicas
    alone = {replica.leader for replica in replicas if replica.tp == 1}
    assert {rank for rank, (_, rank_info) in enumerate(results) if rank_info is None} == alone


def exchange_on_pairs(pairs: list[tuple[int, int]], seed: int, size: int) -> None:
    """Send ``size`` tensors over all pairs at once, with one thread for each end of a pair."""
    groups = new_pair_groups(pairs, "gloo")
    rank = dist.get_rank()
    assert set(groups) == {pair for pair in pairs if rank in pair}
    errors: list[BaseException] = []

    def run(pair: tuple[int, int]) -> None:
        rng = random.Random(f"{seed} {pair}")
        try:
            for number in range(size):
                tensor = torch.full((rng.randrange(1, 50_000),), float(number))
                if rank == pair[0]:
                    dist.send(tensor, pair[1], groups[pair])
                else:
                    received = torch.zeros_like(tensor)
                    dist.recv(received, pair[0], groups[pair])
                    assert torch.equal(received, tensor), f"{pair} {number}"
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(pair,)) for pair in groups]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []


def test_every_pair_has_a_group_of_its_own(world: World) -> None:
    seed = random.randrange(1 << 30)
    print(f"seed {seed}")
    pairs = [(source, target) for source in range(4) for target in range(4) if source != target]
    random.Random(seed).shuffle(pairs)
    world.run(f"{MODULE}:exchange_on_pairs", pairs, seed, 50)


def exchange_in_one_group(seed: int, size: int) -> None:
    """Share a group among the threads of a rank: one for each peer, direction and tag."""
    rank, group = dist.get_rank(), dist.new_group(list(range(dist.get_world_size())))
    errors: list[BaseException] = []

    def run(peer: int, tag: int, sending: bool) -> None:
        source, target = (rank, peer) if sending else (peer, rank)
        rng = random.Random(f"{seed} {source} {target} {tag}")
        try:
            for number in range(size):
                tensor = torch.full((rng.randrange(1, 20_000),), float(number * 10 + tag))
                if sending:
                    dist.send(tensor, peer, group, tag)
                else:
                    received = torch.zeros_like(tensor)
                    dist.recv(received, peer, group, tag)
                    assert torch.equal(received, tensor), f"{source} {target} {tag} {number}"
        except BaseException as error:
            errors.append(error)

    peers = [peer for peer in range(dist.get_world_size()) if peer != rank]
    threads = [
        threading.Thread(target=run, args=(peer, tag, sending))
        for peer in peers
        for tag in range(3)
        for sending in (False, True)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    dist.destroy_process_group(group)


def test_threads_may_share_a_group(world: World) -> None:
    seed = random.randrange(1 << 30)
    print(f"seed {seed}")
    world.run(f"{MODULE}:exchange_in_one_group", seed, 50)


def refuse_pairs(pairs: list[tuple[int, int]]) -> None:
    with pytest.raises(ValueError, match="expected pairs of two ranks, each once"):
        new_pair_groups(pairs, "gloo")


@pytest.mark.parametrize("pairs", [[(0, 1), (0, 1)], [(2, 2)]])
def test_pairs_that_make_no_sense_are_refused(world: World, pairs: list[tuple[int, int]]) -> None:
    world.run(f"{MODULE}:refuse_pairs", pairs)


def test_one_rank_needs_no_torchrun() -> None:
    code = (
        "from serve.comm.process_groups import *; from serve.topology import *;"
        "init_world(read_rank_info({}), 'cpu'); group = new_control_group();"
        "assert dist.get_world_size(group) == 1"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
