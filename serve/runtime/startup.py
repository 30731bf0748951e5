"""Bring rank 0 up: its front end, the readiness of the replicas, the clocks of their leaders."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable

from serve.dispatch.admission import QueueLimits
from serve.dispatch.dispatcher import Dispatcher
from serve.dispatch.metrics import Metrics
from serve.dispatch.service import Service
from serve.engine.loading import Progress
from serve.protocol.clock import best_offset
from serve.protocol.messages import AnyMessage, Ping, Pong, ReplicaReady, Report
from serve.runtime.rank import RankProcess
from serve.tokenizer.tokenizer import Tokenizer

NUM_PINGS = 20  # the fastest one of them gives the offset of a clock

OnMessage = Callable[[AnyMessage], None]


@contextlib.asynccontextmanager
async def serving_front_end(
    process: RankProcess, observe: OnMessage | None = None
) -> AsyncIterator[FrontEnd]:
    """Run rank 0 of the job with a front end, and shut the job down in order at the end.

    The body starts before the model is loaded, so that HTTP can answer meanwhile. It awaits
    ``get_ready`` before it submits requests. ``observe`` gets every message that leaders send to
    the front end, just before the front end does.

    Raises an exception group: with ``JobFailed`` if the job cannot go on, which cancels the body,
    or with the exception of the body.
    """
    front_end = FrontEnd(process)

    def on_message(message: AnyMessage) -> None:
        if observe is not None:
            observe(message)
        front_end.on_message(message)

    async with process.running(on_message):
        front_end.tokenizer = await process.load_tokenizer()
        yield front_end
        await process.shut_down()


class FrontEnd:
    """The service of rank 0, and the state of every replica and leader's clock while they start."""

    def __init__(self, process: RankProcess) -> None:
        config = process.config
        self._process = process
        self._replicas = process.topology.replicas
        self.metrics = Metrics(config.served_model_names[0])
        limits = QueueLimits(
            config.max_waiting, config.max_waiting_tokens, config.max_waiting_share
        )
        dispatcher = Dispatcher(self._replicas, config.dispatch_policy, limits, time.monotonic)
        self.service = Service(dispatcher, process.channel.send, self.metrics, time.monotonic)
        self.tokenizer: Tokenizer | None = None  # None when the server runs without
        self.num_blocks: dict[int, int] = {}  # KV blocks by id of the replicas that are ready
        self._all_ready = asyncio.Event()
        self._offsets_s: dict[int, float] = {}  # by rank: add it to a time of that rank's clock
        self._sent_s: dict[tuple[int, int], float] = {}  # by rank and number of the ping
        self._samples: dict[int, list[tuple[float, float, float]]] = {}
        self._measured = asyncio.Event()

    async def get_ready(self, progress: Progress = lambda done, total: None) -> None:
        """Load this rank's model, wait for every replica, and let the service accept requests.

        ``progress`` gets the numbers of tensors that are loaded and that there are. Raises
        ``ValueError`` with one line for a model or a context length that cannot be served.
        """
        await self._process.load(self.tokenizer, progress)
        await self._all_ready.wait()
        await self._measure_clocks()
        block_size = self._process.setup.block_size
        self.service.set_ready(self._fit_max_model_len(), block_size, self.num_blocks)

    def on_message(self, message: AnyMessage) -> None:
        """Process a message from a leader."""
        match message:
            case Report(replica_id):
                leader = self._replicas[replica_id].leader
                self.service.on_report(message, self._offsets_s.get(leader, 0.0))
            case ReplicaReady(replica_id, num_blocks):
                self.num_blocks[replica_id] = num_blocks
                if len(self.num_blocks) == len(self._replicas):
                    self._all_ready.set()
            case Pong():
                self._on_pong(message)

    def describe_replicas(self) -> str:
        """Return one line for the log: replicas, their ranks and their memory."""
        block_size = self._process.setup.block_size
        return ", ".join(
            f"{replica.role} {replica.id} on rank {'-'.join(map(str, replica.ranks))} "
            f"({self.num_blocks[replica.id]} blocks of {block_size})"
            for replica in self._replicas
        )

    async def _measure_clocks(self) -> None:
        for replica in self._replicas:
            self._samples[replica.leader] = []
            self._ping(replica.leader, 0)
        await self._measured.wait()

    def _ping(self, rank: int, number: int) -> None:
        self._sent_s[rank, number] = time.monotonic()
        self._process.channel.send(rank, Ping(number))

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

    def _fit_max_model_len(self) -> int:
        """Return the longest context that fits any prefill and decode replica.

        Raises ``ValueError`` if ``--max-model-len`` is longer.
        """
        config = self._process.config
        capacity = min(self.num_blocks.values()) * self._process.setup.block_size
        if config.max_model_len is not None and config.max_model_len > capacity:
            raise ValueError(
                f"--max-model-len {config.max_model_len} does not fit: "
                f"the smallest KV cache holds {capacity} tokens"
            )
        return min(config.max_model_len or config.model_config.max_position_embeddings, capacity)
