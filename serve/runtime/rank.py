"""RankProcess: the parts of one process of the job, where its messages go, and how it ends.

The states of a process::

    loading --> running --shut_down()--> every peer has sent Goodbye --> exit 0
       |           |
       +-----------+--> JobFailed: a lost connection, an exception, a silent rank --> exit 1

Rank 0 decides when the job ends. The other ranks shut down when they receive its Goodbye.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import time
from collections.abc import AsyncIterator, Callable

import torch
import torch.distributed as dist

from serve.comm.control import ControlChannel
from serve.config.server import ServerConfig
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
    StopRequest,
)
from serve.protocol.plan import Entry
from serve.replica.limits import SchedulerLimits
from serve.replica.replica import Replica, ReplicaSettings
from serve.replica.stop_check import find_eos_token_ids
from serve.runtime.failure import FirstFailure, JobFailed, RankFailed
from serve.runtime.liveness import watch_peers
from serve.runtime.progress import ProgressWatch
from serve.runtime.shutdown import StopSignals
from serve.tokenizer.tokenizer import Tokenizer, load_tokenizer
from serve.topology import FRONT_END_RANK, RankInfo, Role, Topology

GOODBYE_S = 10.0  # how long an orderly end waits for the other ranks
FAREWELL_S = 3.0  # how long a failing rank waits for rank 0 to end, and rank 0 for the others


class RankProcess:
    """One process of the job: its control channel, its worker and its first failure.

    Create it on the running event loop. ``replica`` is the replica that this rank belongs to, and
    ``is_leader`` says whether the rank decides for it.
    """

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
        self.is_leader = rank_info.rank == self.replica.leader
        self.setup = RankSetup(config, topology, rank_info, device)
        self.failure = FirstFailure(rank_info.rank)
        self._progress = ProgressWatch(config.progress_timeout_s, config.start_timeout_s)
        self.dismissed = asyncio.Event()  # rank 0 has sent Goodbye
        self._front_end_ended = asyncio.Event()  # rank 0 has sent Goodbye or is lost
        self._on_report: Callable[[AnyMessage], None] | None = None
        self.channel = ControlChannel(
            rank_info.rank,
            topology.control_peers(rank_info.rank),
            control_group,
            asyncio.get_running_loop(),
            on_message=self._on_message,
            on_lost=self._on_lost,
            on_entry=None if self.is_leader else self._on_entry,
        )
        self.worker = Worker(
            rank_info.rank,
            topology,
            device,
            self.channel.send,
            self.failure.fail_worker,
        )

    async def load_tokenizer(self) -> Tokenizer | None:
        """Load the tokenizer if this rank needs one: leaders do, unless the server runs without.

        Raises ``ValueError`` with one line if it cannot be loaded.
        """
        config = self.config
        if config.tokenizer is None or not self.is_leader:
            return None
        return await asyncio.to_thread(
            load_tokenizer, config.tokenizer, config.model, config.chat_template
        )

    async def load(self, tokenizer: Tokenizer | None, progress: Progress) -> None:
        """Load the model. Afterwards the replica of a leader accepts requests.

        Raises ``ValueError`` with one line for a model that cannot be served.
        """
        loaded = await self.worker.executor.call(lambda: self._load(progress))
        _freeze_objects()
        if self.is_leader:
            settings = _replica_settings(self.setup, loaded.num_blocks, tokenizer)
            self.worker.lead(Replica(settings, tokenizer, time.monotonic))
            self.channel.send(FRONT_END_RANK, ReplicaReady(self.replica.id, loaded.num_blocks))

    @contextlib.asynccontextmanager
    async def running(
        self,
        on_report: Callable[[AnyMessage], None] | None,
        signals: StopSignals | None = None,
    ) -> AsyncIterator[None]:
        """Send and receive messages, and run the GPU thread, while the body runs.

        On rank 0 ``on_report`` gets the messages for the front end. On the other ranks ``signals``
        are passed on to rank 0. Raises an exception group: with
        ``JobFailed`` if the job cannot go on, which cancels the body, or with the exception of the
        body. The caller shuts the process down, because only then is it clear how.
        """
        self._on_report = on_report
        self.channel.start()
        self.worker.executor.start()
        async with asyncio.TaskGroup() as group:
            loops = [
                group.create_task(self.worker.beat()),
                group.create_task(self.failure.raise_first()),
                group.create_task(
                    watch_peers(self.channel, self.failure, self.config.progress_timeout_s)
                ),
            ]
            if signals is not None:
                loops.append(group.create_task(signals.pass_on(self._request_stop)))
            yield
            for loop in loops:
                loop.cancel()

    async def shut_down(self) -> None:
        """End in order: stop the plan, send Goodbye to every peer and wait for each one's own.

        Raises ``JobFailed`` if a peer has not sent it within ``GOODBYE_S``.
        """
        self.failure.start_shutdown()
        if self.is_leader:
            self.worker.stop()
        self.channel.send_goodbye()
        try:
            await asyncio.wait_for(self.channel.wait_closed(), GOODBYE_S)
        except TimeoutError:
            late = ", ".join(map(str, self.channel.unclosed_peers()))
            raise JobFailed(f"no Goodbye within {GOODBYE_S:.0f} s from rank {late}") from None

    async def report_failure(self, reason: str) -> None:
        """Send rank 0 the reason why this rank fails, and wait for rank 0 to end the job.

        The wait takes at most ``FAREWELL_S``. On rank 0 there is nothing to send.
        """
        self.failure.start_shutdown()
        if not self.is_front_end:
            self.channel.send(FRONT_END_RANK, Failed(self.rank_info.rank, reason))
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._front_end_ended.wait(), FAREWELL_S)

    async def dismiss_ranks(self) -> None:
        """On rank 0: send Goodbye so that the other ranks shut down without errors of their own.

        Waits at most ``FAREWELL_S`` for them.
        """
        self.failure.start_shutdown()
        self.channel.send_goodbye()
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self.channel.wait_closed(), FAREWELL_S)

    def _request_stop(self, at_once: bool) -> None:
        self.channel.send(FRONT_END_RANK, StopRequest(at_once))

    def _load(self, progress: Progress) -> Loaded:
        def advance(done: int, total: int) -> None:
            self.worker.executor.progress.advance()
            progress(done, total)

        loaded = load_rank(self.setup, advance)
        self.worker.executor.attach(loaded.resources)
        return loaded

    def _on_message(self, source: int, message: AnyMessage) -> None:
        match message:
            case Goodbye(rank):
                if rank == FRONT_END_RANK:
                    self.dismissed.set()
                    self._front_end_ended.set()
            case Failed(rank, reason):
                self.failure.fail(RankFailed(f"rank {rank}: {reason}"))
            case Ping(number):
                self.channel.send(source, Pong(self.rank_info.rank, number, time.monotonic()))
            case Report() | ReplicaReady() | Pong() | StopRequest():
                if self._on_report is not None:
                    self._on_report(message)
            case Heartbeat():  # the channel has noted when it arrived
                stuck = self._progress.on_heartbeat(source, message) if self.is_front_end else None
                if stuck is not None:
                    self.failure.fail(JobFailed(stuck))
            case _:
                self.worker.on_message(message)

    def _on_entry(self, entry: Entry) -> None:
        self.worker.executor.enqueue(entry)

    def _on_lost(self, peer: int, reason: str) -> None:
        if peer == FRONT_END_RANK:
            self._front_end_ended.set()
        self.failure.fail(JobFailed(f"lost the connection to rank {peer}: {reason}"))


def _freeze_objects() -> None:
    """Exempt all objects of the start from garbage collection.

    They live as long as the process. A full collection would look at each of them and stop the
    event loop for 42 to 64 ms, and with it every stream.
    """
    gc.collect()
    gc.freeze()


def _replica_settings(
    setup: RankSetup, num_blocks: int, tokenizer: Tokenizer | None
) -> ReplicaSettings:
    limits, model = setup.limits, setup.config.model_config
    return ReplicaSettings(
        replica_id=setup.replica.id,
        leader_of=tuple(replica.leader for replica in setup.topology.replicas),
        num_blocks=num_blocks,
        limits=SchedulerLimits(
            limits.max_num_seqs,
            limits.max_num_batched_tokens,
            # The budget of a decode replica is not meant for whole prompts, so a decode replica
            # always recomputes them in chunks.
            setup.config.enable_chunked_prefill or setup.replica.role is Role.DECODE,
            setup.block_size,
            model.max_window,
            setup.config.kv_overcommit or 1.0,
        ),
        max_push_blocks=setup.max_push_blocks,
        eos_token_ids=find_eos_token_ids(model, tokenizer),
        schedule_policy=setup.config.schedule_policy,
    )
