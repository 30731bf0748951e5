"""Topology: which rank belongs to which replica, and which ranks exchange messages.

Replicas occupy consecutive ranks, in the order of their specifications::

    --replica-spec 2,1 1,1 4,1 --partition-id 2

    rank      0  1 | 2 | 3  4  5  6
    replica   0    | 1 | 2
    role      prefill  | decode
    leader    *      *   *
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum

FRONT_END_RANK = 0  # runs HTTP and dispatch


class Role(StrEnum):
    """Which phases a replica runs."""

    PREFILL = "prefill"
    DECODE = "decode"
    MIXED = "mixed"


@dataclass(frozen=True, slots=True)
class ReplicaSpec:
    """One replica: ``tp * pp`` consecutive ranks with one copy of the model."""

    tp: int
    pp: int = 1


@dataclass(frozen=True, slots=True)
class StoreAddress:
    """Where the ranks meet: torchrun's store, or else a store that rank 0 must host there."""

    host: str
    port: int
    hosted_by_torchrun: bool
    attempt: int  # how often torchrun has restarted the job


@dataclass(frozen=True, slots=True)
class RankInfo:
    """The rank of this process in the job and on its host. A job of one rank needs no store."""

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int
    store: StoreAddress | None = None


_RANK_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")


def read_rank_info(environ: Mapping[str, str]) -> RankInfo:
    """Read the ranks that torchrun set for this process; without torchrun it is the only one.

    Raises ``ValueError`` if variables are missing or contradict each other.
    """
    present = [name for name in _RANK_VARIABLES if name in environ]
    if not present:
        return RankInfo(0, 1, 0, 1)
    if missing := [name for name in _RANK_VARIABLES if name not in environ]:
        raise ValueError(f"{present[0]} is set but {missing[0]} is not: start with torchrun")
    values = (int(environ[name]) for name in _RANK_VARIABLES)
    rank, world_size, local_rank, local_world_size = values
    if not (0 <= rank < world_size and 0 <= local_rank < local_world_size <= world_size):
        values_text = ", ".join(f"{name}={environ[name]}" for name in _RANK_VARIABLES)
        raise ValueError(f"these do not go together: {values_text}")
    store = _read_store_address(environ) if world_size > 1 else None
    return RankInfo(rank, world_size, local_rank, local_world_size, store)


def _read_store_address(environ: Mapping[str, str]) -> StoreAddress:
    for name in ("MASTER_ADDR", "MASTER_PORT"):
        if name not in environ:
            raise ValueError(f"{name} is not set: start with torchrun")
    return StoreAddress(
        environ["MASTER_ADDR"],
        int(environ["MASTER_PORT"]),
        environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True",
        int(environ.get("TORCHELASTIC_RESTART_COUNT", "0")),
    )


@dataclass(frozen=True, slots=True)
class ReplicaInfo:
    """One replica: its role and its consecutive ranks, pipeline stage by pipeline stage."""

    id: int
    role: Role
    ranks: tuple[int, ...]
    tp: int
    pp: int

    @property
    def leader(self) -> int:
        """The rank that schedules for the replica."""
        return self.ranks[0]


@dataclass(frozen=True, slots=True)
class Topology:
    """All replicas of the job. The id of a replica is its index."""

    replicas: tuple[ReplicaInfo, ...]

    @property
    def world_size(self) -> int:
        return sum(len(replica.ranks) for replica in self.replicas)

    @property
    def prefill_replicas(self) -> tuple[ReplicaInfo, ...]:
        """Replicas that prefill, mixed ones included."""
        return tuple(replica for replica in self.replicas if replica.role is not Role.DECODE)

    @property
    def decode_replicas(self) -> tuple[ReplicaInfo, ...]:
        """Replicas that decode, mixed ones included."""
        return tuple(replica for replica in self.replicas if replica.role is not Role.PREFILL)

    def replica_of(self, rank: int) -> ReplicaInfo:
        """Return the replica of ``rank``. Raises ``ValueError`` if there is no such rank."""
        for replica in self.replicas:
            if rank in replica.ranks:
                return replica
        raise ValueError(f"rank {rank} is not one of the {self.world_size} ranks")

    def tp_rank(self, rank: int) -> int:
        """Return the index of ``rank`` among the ranks that share its layers."""
        replica = self.replica_of(rank)
        return replica.ranks.index(rank) % replica.tp

    def links(self) -> tuple[tuple[ReplicaInfo, ReplicaInfo], ...]:
        """Return every (prefill, decode) pair that transfers KV, in the same order on all ranks.

        Mixed replicas decode their own prompts, so they have no links.
        """
        return tuple(
            (prefill, decode)
            for prefill in self.replicas
            if prefill.role is Role.PREFILL
            for decode in self.replicas
            if decode.role is Role.DECODE
        )

    def control_peers(self, rank: int) -> tuple[int, ...]:
        """Return the other ranks that ``rank`` exchanges messages with, in ascending order.

        Rank 0 exchanges messages with all ranks, leaders with their followers, and leaders of
        prefill replicas with leaders of decode replicas.
        """
        replica = self.replica_of(rank)
        peers = {FRONT_END_RANK, replica.leader}
        if rank == FRONT_END_RANK:
            peers |= set(range(self.world_size))
        if rank == replica.leader:
            peers |= set(replica.ranks)
            if replica in self.prefill_replicas:
                peers |= {other.leader for other in self.decode_replicas}
            if replica in self.decode_replicas:
                peers |= {other.leader for other in self.prefill_replicas}
        return tuple(sorted(peers - {rank}))


def build_topology(
    replica_specs: Sequence[ReplicaSpec], partition_id: int, mixed: bool
) -> Topology:
    """Assign consecutive ranks to the replicas.

    The first ``partition_id`` replicas prefill and the others decode. With ``mixed`` all replicas
    do both. Raises ``ValueError`` if a phase has no replica.
    """
    if not mixed and not 0 < partition_id < len(replica_specs):
        raise ValueError(
            f"partition {partition_id} of {len(replica_specs)} replicas leaves a phase without one"
        )
    replicas: list[ReplicaInfo] = []
    first_rank = 0
    for id, spec in enumerate(replica_specs):
        role = Role.PREFILL if id < partition_id else Role.DECODE
        ranks = tuple(range(first_rank, first_rank + spec.tp * spec.pp))
        replicas.append(ReplicaInfo(id, Role.MIXED if mixed else role, ranks, spec.tp, spec.pp))
        first_rank += len(ranks)
    return Topology(tuple(replicas))
