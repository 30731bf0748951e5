"""Rank 0's view of the job: gathers the replicas at start, then feeds reports to the service."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

from serve.config.server import ServerConfig
from serve.dispatch.dispatcher import Dispatcher
from serve.dispatch.metrics import Metrics
from serve.dispatch.service import Service
from serve.protocol.clock import best_offset
from serve.protocol.messages import AnyMessage, Ping, Pong, ReplicaReady, Report
from serve.topology import Topology

NUM_PINGS = 20


class FrontEnd:
    """Knows which replicas are ready and how their clocks differ; owns no request."""

    def __init__(
        self, topology: Topology, service: Service, send: Callable[[int, AnyMessage], None]
    ) -> None:
        self.service = service
        self._topology = topology
        self._send = send
        self._num_blocks: dict[int, int] = {}
        self._all_ready = asyncio.Event()
        self._offsets_s: dict[int, float] = {}  # by rank: what to add to that rank's clock
        self._sent_s: dict[tuple[int, int], float] = {}
        self._samples: dict[int, list[tuple[float, float, float]]] = {}
        self._measured = asyncio.Event()

    def on_message(self, message: AnyMessage) -> None:
        """What a leader tells rank 0."""
        match message:
            case Report(replica_id):
                leader = self._topology.replicas[replica_id].leader
                self.service.on_report(message, self._offsets_s.get(leader, 0.0))
            case ReplicaReady(replica_id, num_blocks):
                self._num_blocks[replica_id] = num_blocks
                if len(self._num_blocks) == len(self._topology.replicas):
                    self._all_ready.set()
            case Pong():
                self._on_pong(message)

    async def gather(self) -> dict[int, int]:
        """Wait until every replica is ready and every leader's clock is known.

        Returns the number of KV blocks by replica id.
        """
        await self._all_ready.wait()
        for replica in self._topology.replicas:
            self._samples[replica.leader] = []
            self._ping(replica.leader, 0)
        await self._measured.wait()
        return dict(self._num_blocks)

    def _ping(self, rank: int, number: int) -> None:
        self._sent_s[rank, number] = time.monotonic()
        self._send(rank, Ping(number))

    def _on_pong(self, pong: Pong) -> None:
        samples = self._samples[pong.rank]
        sent_s = self._sent_s.pop((pong.rank, pong.number))
        samples.append((sent_s, pong.clock_s, time.monotonic()))
        if len(samples) < NUM_PINGS:
            self._ping(pong.rank, pong.number + 1)
            return
        self._offsets_s[pong.rank] = best_offset(samples)
        if len(self._offsets_s) == len(self._samples):
            self._measured.set()


def make_front(
    config: ServerConfig,
    topology: Topology,
    metrics: Metrics,
    send: Callable[[int, AnyMessage], None],
) -> FrontEnd:
    """Dispatcher and service; ``send`` puts a message on the control channel."""
    dispatcher = Dispatcher(
        topology.replicas, config.dispatch_policy, config.max_waiting, time.monotonic
    )
    return FrontEnd(topology, Service(dispatcher, send, metrics, time.monotonic), send)


def fit_max_model_len(config: ServerConfig, block_size: int, num_blocks: dict[int, int]) -> int:
    """The longest context that any choice of replicas can hold.

    ``ValueError`` if ``--max-model-len`` asked for more.
    """
    wanted = config.max_model_len
    capacity = min(num_blocks.values()) * block_size
    if wanted is not None and wanted > capacity:
        raise ValueError(
            f"--max-model-len {wanted} does not fit: the smallest KV cache holds {capacity} tokens"
        )
    return min(wanted or config.model_config.max_position_embeddings, capacity)


def describe(topology: Topology, block_size: int, num_blocks: dict[int, int]) -> str:
    """One line for the log: replicas, their ranks and memory."""
    return ", ".join(
        f"{replica.role} {replica.id} on rank {'-'.join(map(str, replica.ranks))} "
        f"({num_blocks[replica.id]} blocks of {block_size})"
        for replica in topology.replicas
    )
