"""Jobs of up to four ranks inside a long-lived gloo world: everything but HTTP, as it is served.

``serve_case`` runs on every rank of the world. Rank 0 plays the clients and returns what they got.
"""

from __future__ import annotations

import asyncio
import gc
from collections.abc import Callable
from typing import Any, Literal

import msgspec
import torch.distributed as dist

from serve.comm.process_groups import new_control_group, new_pair_groups, new_tp_groups
from serve.config.server import ServerConfig, parse_args
from serve.device import pick_device
from serve.dispatch.metrics import Metrics
from serve.dispatch.service import Service, Stream
from serve.engine.loading import find_routes
from serve.engine.rank_setup import RankSetup
from serve.protocol.messages import AnyMessage, Report
from serve.request import FinishReason, Request, SamplingParams
from serve.runtime.rank import RankProcess
from serve.runtime.server import follow
from serve.runtime.startup import fit_max_model_len, make_front
from serve.topology import RankInfo, Topology, build_topology


class Job(msgspec.Struct):
    """What one simulated client asks, and when it loses interest (tokens seen; None: never)."""

    prompt_ids: tuple[int, ...]
    sampling: SamplingParams
    abort_after: int | None = None


class Answer(msgspec.Struct):
    """What it got."""

    token_ids: list[int]
    text: str
    finish_reason: FinishReason
    timeline: dict[str, float]


class CaseResult(msgspec.Struct):
    """The answers in the order of the jobs, and the cluster when everything had come to rest."""

    answers: list[Answer]
    cluster: list[dict[str, Any]]
    num_preemptions: int


def serve_case(argv: list[str], num_ranks: int, jobs: bytes) -> bytes | None:
    """Start a job of ``num_ranks`` ranks, put ``jobs`` to it, stop it in order."""
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
        gc.collect()  # the caches of one case should not meet those of the next


def _stand_by(setup: RankSetup) -> None:
    """Ranks that are not in the job still take part in making its groups."""
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
    await process.run(_lead(process, jobs, results) if rank_info.rank == 0 else follow(process))
    return msgspec.msgpack.encode(results[0]) if results else None


async def _lead(process: RankProcess, jobs: list[Job], results: list[CaseResult]) -> None:
    front = make_front(process.config, process.topology, Metrics("test"), process.channel.send)
    changed = asyncio.Event()
    process.tell_front = _announce(front.on_message, changed)
    await process.load(await process.load_tokenizer(), lambda done, total: None)
    front.service.set_ready(
        fit_max_model_len(process.config, process.setup.block_size, await front.gather())
    )
    requests = [
        Request(id=f"job-{i}", prompt_ids=job.prompt_ids, sampling=job.sampling)
        for i, job in enumerate(jobs)
    ]
    streams = front.service.submit(requests)
    clients = [_consume(front.service, s, j) for s, j in zip(streams, jobs, strict=True)]
    answers = await asyncio.gather(*clients)
    while not at_rest(front.service.cluster()):
        changed.clear()
        await changed.wait()
    preemptions = sum(report.num_preemptions for report in _LOADS.values())
    results.append(CaseResult(list(answers), front.service.cluster(), preemptions))
    _LOADS.clear()
    await process.shut_down()


_LOADS: dict[int, Any] = {}  # by replica, as last reported; one case at a time


def _announce(
    inner: Callable[[AnyMessage], None], changed: asyncio.Event
) -> Callable[[AnyMessage], None]:
    def on_message(message: AnyMessage) -> None:
        inner(message)
        if isinstance(message, Report):
            _LOADS[message.replica_id] = message.load
            changed.set()

    return on_message


def at_rest(cluster: list[dict[str, Any]]) -> bool:
    """Whether every replica is idle and owns none of its blocks."""
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
