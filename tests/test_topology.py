"""Topology: the ranks of each replica, their roles, and the connections between ranks."""

from __future__ import annotations

import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serve.protocol.clock import best_offset
from serve.topology import (
    RankInfo,
    ReplicaSpec,
    Role,
    StoreAddress,
    Topology,
    build_topology,
    read_rank_info,
)

ENVIRON = {
    "RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4",
    "MASTER_ADDR": "host-a", "MASTER_PORT": "29500",
}  # fmt: skip


@st.composite
def topologies(draw: st.DrawFn) -> Topology:
    specs = [
        ReplicaSpec(draw(st.integers(1, 4)), draw(st.integers(1, 2)))
        for _ in range(draw(st.integers(2, 6)))
    ]
    return build_topology(specs, draw(st.integers(1, len(specs) - 1)), draw(st.booleans()))


def test_replicas_take_consecutive_ranks() -> None:
    topology = build_topology([ReplicaSpec(2), ReplicaSpec(1), ReplicaSpec(4)], 2, False)
    assert [replica.ranks for replica in topology.replicas] == [(0, 1), (2,), (3, 4, 5, 6)]
    assert [replica.leader for replica in topology.replicas] == [0, 2, 3]
    assert [replica.id for replica in topology.prefill_replicas] == [0, 1]
    assert [replica.id for replica in topology.decode_replicas] == [2]
    assert topology.world_size == 7
    assert [topology.tp_rank(rank) for rank in range(7)] == [0, 1, 0, 0, 1, 2, 3]
    assert [(p.id, d.id) for p, d in topology.links()] == [(0, 2), (1, 2)]
    assert [topology.control_peers(rank) for rank in range(7)] == [
        (1, 2, 3, 4, 5, 6),  # every other rank
        (0,),
        (0, 3),  # the decode replica's leader
        (0, 2, 4, 5, 6),  # the prefill leaders and its own followers
        (0, 3),
        (0, 3),
        (0, 3),
    ]


def test_mixed_replicas_have_both_roles_and_no_links() -> None:
    topology = build_topology([ReplicaSpec(1), ReplicaSpec(2)], 0, True)
    assert {replica.role for replica in topology.replicas} == {Role.MIXED}
    assert topology.prefill_replicas == topology.decode_replicas == topology.replicas
    assert topology.links() == ()


def test_a_single_rank_has_no_peers() -> None:
    topology = build_topology([ReplicaSpec(1)], 0, True)
    assert topology.control_peers(0) == ()
    assert topology.replica_of(0).ranks == (0,)


def test_tp_ranks_restart_in_each_pipeline_stage() -> None:
    topology = build_topology([ReplicaSpec(2, 2)], 0, True)
    assert [topology.tp_rank(rank) for rank in range(4)] == [0, 1, 0, 1]


@given(topologies())
def test_peers_are_symmetric_and_include_the_leaders(topology: Topology) -> None:
    ranks = [rank for replica in topology.replicas for rank in replica.ranks]
    assert ranks == list(range(topology.world_size))
    for rank in ranks:
        peers = topology.control_peers(rank)
        assert rank not in peers
        assert list(peers) == sorted(set(peers))
        assert all(rank in topology.control_peers(peer) for peer in peers)
        assert rank in topology.replica_of(rank).ranks
        assert rank == 0 or {0, topology.replica_of(rank).leader} - {rank} <= set(peers)
    for prefill, decode in topology.links():
        assert (prefill.role, decode.role) == (Role.PREFILL, Role.DECODE)
        both = {prefill.leader, decode.leader}
        assert both - {prefill.leader} <= set(topology.control_peers(prefill.leader))


@pytest.mark.parametrize("partition_id", [0, 2, 3, -1])
def test_a_phase_without_replicas_is_refused(partition_id: int) -> None:
    with pytest.raises(ValueError, match="leaves a phase without one"):
        build_topology([ReplicaSpec(1), ReplicaSpec(1)], partition_id, False)


@pytest.mark.parametrize("rank", [-1, 2])
def test_a_rank_that_does_not_exist_is_refused(rank: int) -> None:
    topology = build_topology([ReplicaSpec(1), ReplicaSpec(1)], 1, False)
    for query in (topology.replica_of, topology.tp_rank, topology.control_peers):
        with pytest.raises(ValueError, match=f"rank {rank} "):
            query(rank)


def test_the_rank_is_read_from_the_environment() -> None:
    assert read_rank_info({}) == RankInfo(0, 1, 0, 1)
    store = StoreAddress("host-a", 29500, hosted_by_torchrun=False, attempt=0)
    assert read_rank_info(ENVIRON) == RankInfo(5, 8, 1, 4, store)
    under_torchrun = {"TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RESTART_COUNT": "2"}
    store = StoreAddress("host-a", 29500, hosted_by_torchrun=True, attempt=2)
    assert read_rank_info(ENVIRON | under_torchrun).store == store
    alone = ENVIRON | {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
    assert read_rank_info(alone).store is None


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"WORLD_SIZE": None}, "WORLD_SIZE is not: start with torchrun"),
        ({"LOCAL_RANK": None}, "LOCAL_RANK is not: start with torchrun"),
        ({"MASTER_ADDR": None}, "MASTER_ADDR is not set: start with torchrun"),
        ({"RANK": "8"}, "RANK=8, WORLD_SIZE=8"),
        ({"LOCAL_RANK": "4"}, "LOCAL_RANK=4, LOCAL_WORLD_SIZE=4"),
        ({"RANK": "x"}, "invalid literal for int.*'x'"),
    ],
)
def test_an_incomplete_or_impossible_rank_environment_is_refused(
    change: dict[str, str | None], reason: str
) -> None:
    environ = {name: text for name, text in (ENVIRON | change).items() if text is not None}
    with pytest.raises(ValueError, match=reason):
        read_rank_info(environ)


def test_topology_needs_no_torch() -> None:
    code = "import sys, serve.topology, serve.protocol.clock; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_the_fastest_ping_sets_the_clock_offset() -> None:
    remote_ahead_s = 1000.0
    samples = [
        (10.0, 1010.9 + 0.0, 11.0),  # the request was slow
        (20.0, 1020.001, 20.002),
        (30.0, 1030.0, 30.5),  # the reply was slow
    ]
    assert best_offset(samples) == pytest.approx(-remote_ahead_s, abs=1e-9)
    with pytest.raises(ValueError, match="no ping"):
        best_offset([])
