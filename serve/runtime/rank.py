"""One process of the job: starts its parts, routes its messages, stops them in order.

Its life::

    loading --> running --leave()--> every peer has said Goodbye --> exit 0
       |           |
       +-----------+--> JobFailed: a lost connection, an exception, a silent rank --> exit 1

Rank 0 decides when the job ends; the others leave when it says Goodbye.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import sys
import time
from collections.abc import Callable, Coroutine
from typing import Any

import torch
import torch.distributed as dist

from serve.comm.control import ControlChannel
from serve.comm.process_groups import init_world, new_control_group
from serve.config.server import ServerConfig
from serve.device import pick_device
from serve.engine.loading import Loaded, Progress, load_rank
from serve.engine.rank_setup import RankSetup
from serve.engine.worker import Worker
from serve.protocol.messages import (
    AnyMessage,
    Failed,
    Goodbye,
    Heartbeat,
    Ping,
    Pong,
    ReplicaReady,
    Report,
)
from serve.replica.replica import Replica, ReplicaSettings
from serve.replica.scheduler import SchedulerLimits
from serve.tokenizer.tokenizer import Tokenizer, load_tokenizer
from serve.topology import FRONT_END_RANK, RankInfo, Role, Topology, build_topology

log = logging.getLogger(__name__)

SILENCE_LIMIT_S = 60.0
SILENCE_CHECK_S = 5.0
BLAME_S = 1.0  # within which the channel tells that a rank is lost, if that is what broke the rest
SWITCH_INTERVAL_S = 1e-4  # with 5 ms a busy event loop starves the GPU thread, and it the loop
FAREWELL_S = 3.0  # how long a failing rank waits for rank 0 to have read its last words


class JobFailed(Exception):
    """The job cannot go on; one line says why."""


class RankFailed(JobFailed):
    """Another rank says that it cannot go on; all connections are whole."""


class RankProcess:
    """This rank's channel and worker, and on rank 0 the front end, on the running event loop."""

    def __init__(
        self,
        config: ServerConfig,
        rank_info: RankInfo,
        topology: Topology,
        device: torch.device,
        control_group: dist.ProcessGroup,
    ) -> None:
        self.config, self.rank_info, self.topology = config, rank_info, topology
        self.replica = topology.replica_of(rank_info.rank)
        self.is_front_end = rank_info.rank == FRONT_END_RANK
        self.leads = rank_info.rank == self.replica.leader
        self.setup = RankSetup(config, topology, rank_info, device)
        self.tell_front: Callable[[AnyMessage], None] | None = None  # on rank 0, before run()
        self._failed: asyncio.Future[JobFailed] = asyncio.get_running_loop().create_future()
        self.dismissed = asyncio.Event()  # rank 0 has said Goodbye
        self._front_gone = asyncio.Event()  # it has, or it is lost
        self._leaving = False
        asyncio.get_running_loop().set_exception_handler(self._on_loop_error)
        self.channel = ControlChannel(
            rank_info.rank,
            topology.control_peers(rank_info.rank),
            control_group,
            asyncio.get_running_loop(),
            on_message=self._on_message,
            on_lost=self._on_lost,
            on_entry=None if self.leads else self._on_entry,
        )
        self.worker = Worker(
            rank_info.rank,
            self.replica,
            len(topology.replicas),
            device,
            self.channel.send,
            self._on_error,
        )

    async def load_tokenizer(self) -> Tokenizer | None:
        """The tokenizer, on ranks that need one. ``ValueError`` with one line if there is none."""
        config = self.config
        if config.tokenizer is None or not self.leads:
            return None
        return await asyncio.to_thread(
            load_tokenizer, config.tokenizer, config.model, config.chat_template
        )

    async def load(self, tokenizer: Tokenizer | None, progress: Progress) -> None:
        """Load the model; from then on the replica of a leader takes requests.

        Raises ``ValueError`` with one line for what cannot be served.
        """
        loaded = await self.worker.executor.call(lambda: self._load(progress))
        if self.leads:
            self.worker.lead(self._make_replica(loaded, tokenizer))
            self.channel.send(FRONT_END_RANK, ReplicaReady(self.replica.id, loaded.num_blocks))

    async def run(self, main: Coroutine[Any, Any, None]) -> None:
        """Run ``main`` beside the rank's own loops. Raises ``JobFailed`` if the job cannot go on.

        Both that and whatever ``main`` raises come out in an exception group.
        """
        self.channel.start()
        self.worker.executor.start()
        async with asyncio.TaskGroup() as group:
            loops = [group.create_task(self.worker.beat()), group.create_task(self._raise())]
            if self.is_front_end:
                loops.append(group.create_task(self._watch()))
            await main
            for loop in loops:
                loop.cancel()

    async def leave(self) -> None:
        """End in order: the plan stops, everybody says Goodbye, and hears it."""
        self._leaving = True
        if self.leads:
            self.worker.stop()
        self.channel.send_goodbye()
        await self.channel.wait_closed()

    def abandon(self, reason: str) -> None:
        """The job cannot go on, for a reason from outside."""
        self._fail(JobFailed(reason))

    @property
    def reason(self) -> str:
        """Why the job has failed; empty if it has not."""
        return str(self._failed.result()) if self._failed.done() else ""

    async def last_words(self, reason: str) -> None:
        """Tell rank 0 why this rank cannot go on, and give it the time to end the job."""
        self._leaving = True
        if not self.is_front_end:
            self.channel.send(FRONT_END_RANK, Failed(self.rank_info.rank, reason))
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._front_gone.wait(), FAREWELL_S)

    async def dismiss(self) -> None:
        """On rank 0: the job ends here, and the others, which can do nothing about it, leave."""
        self._leaving = True
        self.channel.send_goodbye()
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self.channel.wait_closed(), FAREWELL_S)

    def _load(self, progress: Progress) -> Loaded:
        loaded = load_rank(self.setup, progress)
        self.worker.executor.attach(loaded.resources)
        return loaded

    def _make_replica(self, loaded: Loaded, tokenizer: Tokenizer | None) -> Replica:
        limits, model = self.setup.limits, self.config.model_config
        settings = ReplicaSettings(
            replica_id=self.replica.id,
            leader_of=tuple(replica.leader for replica in self.topology.replicas),
            num_blocks=loaded.num_blocks,
            limits=SchedulerLimits(
                limits.max_num_seqs,
                limits.max_num_batched_tokens,
                # A decode replica's budget is not meant for whole prompts: it recomputes in chunks.
                self.config.enable_chunked_prefill or self.replica.role is Role.DECODE,
                self.setup.block_size,
                model.max_window,
            ),
            max_push_blocks=self.setup.max_push_blocks,
            eos_token_ids=tuple(i for i in model.eos_token_ids if i < model.vocab_size),
        )
        return Replica(settings, tokenizer, time.monotonic)

    def _on_message(self, source: int, message: AnyMessage) -> None:
        match message:
            case Goodbye(rank):
                if rank == FRONT_END_RANK:
                    self.dismissed.set()
                    self._front_gone.set()
            case Failed(rank, reason):
                self._fail(RankFailed(f"rank {rank}: {reason}"))
            case Ping(number):
                self.channel.send(source, Pong(self.rank_info.rank, number, time.monotonic()))
            case Report() | ReplicaReady() | Pong():
                if self.tell_front is not None:
                    self.tell_front(message)
            case Heartbeat():
                pass  # the channel notes when it last heard of a peer
            case _:
                self.worker.on_message(message)

    def _on_entry(self, entry: Any) -> None:
        self.worker.executor.enqueue(entry)

    def _on_lost(self, peer: int, reason: str) -> None:
        if peer == FRONT_END_RANK:
            self._front_gone.set()
        self._fail(JobFailed(f"lost the connection to rank {peer}: {reason}"))

    def _on_error(self, error: BaseException) -> None:
        """The worker is broken; a rank that is lost breaks it as well, and is the better reason."""
        asyncio.get_running_loop().call_later(BLAME_S, self._blame_worker, error)

    def _blame_worker(self, error: BaseException) -> None:
        if not self._leaving and not self._failed.done():
            log.error("the worker of rank %d failed", self.rank_info.rank, exc_info=error)
            self._fail(JobFailed(f"{type(error).__name__}: {error}"))

    def _on_loop_error(self, loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        """What a callback raises would be logged and forgotten; a message is never just dropped."""
        loop.default_exception_handler(context)
        if "handle" in context:
            self._fail(JobFailed(f"{context['message']}: {context.get('exception')!r}"))

    def _fail(self, error: JobFailed) -> None:
        if not self._leaving and not self._failed.done():
            self._failed.set_result(error)

    async def _raise(self) -> None:
        raise await self._failed

    async def _watch(self) -> None:
        """End the job if a rank is silent on a connection that lives."""
        while True:
            await asyncio.sleep(SILENCE_CHECK_S)
            if silent := self.channel.silent_peers(SILENCE_LIMIT_S):
                reason = f"rank {silent[0]} has been silent for {SILENCE_LIMIT_S:.0f} s"
                self._fail(JobFailed(reason))


def join_job(config: ServerConfig, rank_info: RankInfo) -> RankProcess:
    """Meet the other ranks of the job and become one of its nodes, on the running event loop."""
    sys.setswitchinterval(SWITCH_INTERVAL_S)
    device = pick_device(rank_info.local_rank)
    init_world(rank_info, "cuda" if device.type == "cuda" else "cpu")
    topology = build_topology(config.replica_specs, config.partition_id, mixed=config.colocated)
    return RankProcess(config, rank_info, topology, device, new_control_group())
