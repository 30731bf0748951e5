"""Jobs of up to four ranks inside a long-lived gloo world: all of a served job but HTTP.

``serve_case`` runs on every rank of the world. Rank 0 also runs the clients and returns their
answers.
"""

from __future__ import annotations

import asyncio
import gc
from typing import Any, Literal

import msgspec
import torch.distributed as dist

from serve.comm.process_groups import new_control_group, new_pair_groups, new_tp_groups
from serve.config.server import ServerConfig, parse_args
from serve.device import pick_device
from serve.dispatch.service import Service, Stream
from serve.engine.loading import find_routes
from serve.engine.rank_setup import RankSetup
from serve.protocol.messages import AnyMessage, ReplicaLoad, Report
from serve.request import FinishReason, Request, SamplingParams, pack_ids
from serve.runtime.rank import RankProcess
from serve.runtime.server import work_until_dismissed
from serve.runtime.startup import serving_front_end
from serve.topology import RankInfo, Topology, build_topology


class Job(msgspec.Struct):
    """The request of one simulated client, and after how many tokens it aborts (None: never)."""

    prompt_ids: tuple[int, ...]
    sampling: SamplingParams
    abort_after: int | None = None


class Answer(msgspec.Struct):
    """The answer to one job."""

    token_ids: list[int]
    text: str
    finish_reason: FinishReason
    timeline: dict[str, float]


class CaseResult(msgspec.Struct):
    """The answers in the order of the jobs, and the cluster once all replicas were idle."""

    answers: list[Answer]
    cluster: list[dict[str, Any]]
    num_preemptions: int


def serve_case(argv: list[str], num_ranks: int, jobs: bytes) -> bytes | None:
    """Start a job of ``num_ranks`` ranks, submit ``jobs`` to it, shut it down in order."""
    rank = dist.get_rank()
    config = parse_args(argv, num_ranks)
    topology = build_topology(config.replica_specs, config.partition_id, config.partition_id == 0)
    control_group = new_control_group()
    rank_info = RankInfo(rank, num_ranks, rank, num_ranks)
    if rank >= num_ranks:
        _stand_by(RankSetup(config, topology, rank_info, pick_device(rank_info.local_rank)))
        return None
    decoded = msgspec.msgpack.decode(jobs, type=list[Job])
    try:
        return asyncio.run(_run(config, topology, rank_info, control_group, decoded))
    finally:
        gc.collect()  # free the KV cache before the next case allocates its own


def _stand_by(setup: RankSetup) -> None:
    """Create the groups of the job on a rank outside it, because all ranks must take part."""
    backend: Literal["gloo", "nccl"] = "nccl" if setup.device.type == "cuda" else "gloo"
    new_tp_groups(setup.topology, backend)
    new_pair_groups([route.ranks for route in find_routes(setup)], backend)


async def _run(
    config: ServerConfig,
    topology: Topology,
    rank_info: RankInfo,
    control_group: dist.ProcessGroup,
    jobs: list[Job],
) -> bytes | None:
    process = RankProcess(
        config, rank_info, topology, pick_device(rank_info.local_rank), control_group
    )
    results: list[CaseResult] = []
    if rank_info.rank == 0:
        await _run_clients(process, jobs, results)
    else:
        await work_until_dismissed(process)
    return msgspec.msgpack.encode(results[0]) if results else None


async def _run_clients(process: RankProcess, jobs: list[Job], results: list[CaseResult]) -> None:
    loads = Loads()
    async with serving_front_end(process, observe=loads.on_message) as front_end:
        await front_end.get_ready()
        service = front_end.service
        requests = [
            Request(id=f"job-{i}", prompt=pack_ids(job.prompt_ids), sampling=job.sampling)
            for i, job in enumerate(jobs)
        ]
        streams = service.submit(requests)
        clients = [_consume(service, s, j) for s, j in zip(streams, jobs, strict=True)]
        answers = await asyncio.gather(*clients)
        while not at_rest(service.cluster()):
            await loads.changed()
        results.append(CaseResult(list(answers), service.cluster(), loads.num_preemptions))


class Loads:
    """The load of each replica as last reported."""

    def __init__(self) -> None:
        self._loads: dict[int, ReplicaLoad] = {}
        self._changed = asyncio.Event()

    def on_message(self, message: AnyMessage) -> None:
        if isinstance(message, Report):
            self._loads[message.replica_id] = message.load
            self._changed.set()

    async def changed(self) -> None:
        """Wait for the next report."""
        self._changed.clear()
        await self._changed.wait()

    @property
    def num_preemptions(self) -> int:
        return sum(load.num_preemptions for load in self._loads.values())


def at_rest(cluster: list[dict[str, Any]]) -> bool:
    """Return whether every replica is idle and all of its blocks are free."""
    counts = ("num_waiting", "num_running", "num_receiving", "num_sending")
    return all(
        replica["num_free_blocks"] == replica["num_blocks"]
        and not any(replica[count] for count in counts)
        for replica in cluster
    )


async def _consume(service: Service, stream: Stream, job: Job) -> Answer:
    token_ids: list[int] = []
    text = ""
    async for output in stream:
        assert output.first_index == len(token_ids) or output.finish_reason == FinishReason.ABORT
        token_ids += output.token_ids
        text += output.text
        if output.finish_reason is not None:
            stamps = msgspec.to_builtins(output.timeline) if output.timeline else {}
            return Answer(token_ids, text, output.finish_reason, stamps)
        if job.abort_after is not None and len(token_ids) >= job.abort_after:
            service.abort(stream.request.id)
    raise AssertionError(f"{stream.request.id} ended without a reason")
