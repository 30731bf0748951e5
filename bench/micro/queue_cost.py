"""Host time of one event on a replica and on the dispatcher, beside short and long queues.

    python -m bench.micro.queue_cost
    python -m bench.micro.queue_cost --queued 100 1000000

Prints one JSON object: for each kind of event the mean microseconds, by the number of prompts that
wait. They should be equal, except for the logarithm of a heap and the caches of the CPU.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable

from serve.dispatch.admission import QueueLimits
from serve.dispatch.dispatcher import Dispatcher
from serve.protocol.messages import (
    Abort,
    Delta,
    Offer,
    Prefill,
    PushReceived,
    Ready,
    ReplicaLoad,
    Report,
)
from serve.replica.limits import SchedulerLimits
from serve.replica.replica import Replica, ReplicaSettings
from serve.request import Request, SamplingParams, pack_ids
from serve.topology import ReplicaInfo, Role

NUM_EVENTS = 500
PROMPT = pack_ids(range(64))
LIMITS = SchedulerLimits(256, 8192, True, block_size=16)


def make_request(name: str) -> Request:
    return Request(id=name, prompt=PROMPT, sampling=SamplingParams(max_tokens=1 << 20))


def make_replica(num_blocks: int) -> Replica:
    """Make replica 0, whose prompts may decode on replica 1."""
    return Replica(ReplicaSettings(0, (1, 2), num_blocks, LIMITS, 64, ()), None, time.monotonic)


def mean_us(event: Callable[[int], object]) -> float:
    """Run ``event(i)`` for each number and return the mean time of one."""
    started_s = time.perf_counter()
    for i in range(NUM_EVENTS):
        event(i)
    return round((time.perf_counter() - started_s) / NUM_EVENTS * 1e6, 2)


def time_prompts(num_queued: int) -> dict[str, float]:
    """Time a colocated replica whose pool is full."""
    replica = make_replica(2048)

    def step(_: int) -> None:
        planned = replica.next_step()
        assert planned is not None
        replica.on_step([1] * len(planned.rows))

    for i in range(num_queued):
        replica.on_message(Prefill.of((make_request(f"q{i}"), 0)))
    step(0)
    stride = max(1, (num_queued - 400) // NUM_EVENTS)
    return {
        "step": mean_us(step),
        "prefill": mean_us(lambda i: replica.on_message(Prefill.of((make_request(f"n{i}"), 0)))),
        "abort": mean_us(lambda i: replica.on_message(Abort(f"q{num_queued - 1 - i * stride}"))),
        "heartbeat": mean_us(lambda i: replica.heartbeat()),
    }


def time_offers(num_queued: int) -> dict[str, float]:
    """Time a decode replica that has no room for more offers."""
    replica = make_replica(2048)
    for i in range(num_queued):
        replica.on_message(Offer(1, make_request(f"q{i}")))
    return {
        "offer": mean_us(lambda i: replica.on_message(Offer(1, make_request(f"n{i}")))),
        "abort_offer": mean_us(lambda i: replica.on_message(Abort(f"n{i}"))),
    }


def time_pushes(num_queued: int) -> dict[str, float]:
    """Time a prefill replica with ``num_queued`` finished prompts that wait for their Ready."""
    replica = make_replica(4 * (num_queued + NUM_EVENTS) + 4096)
    for i in range(num_queued + NUM_EVENTS):
        replica.on_message(Prefill.of((make_request(f"q{i}"), 1)))
    while (planned := replica.next_step()) is not None:
        replica.on_step([1] * len(planned.rows))

    def push(i: int) -> None:
        replica.on_message(Ready(f"q{num_queued + i}"))
        replica.on_message(PushReceived(1, i))

    return {"ready_push_received": mean_us(push)}


def time_dispatcher(num_queued: int) -> dict[str, float]:
    """Time rank 0 with ``num_queued`` requests that have no first token."""
    infos = [ReplicaInfo(0, Role.PREFILL, (0,), 1, 1), ReplicaInfo(1, Role.DECODE, (1,), 1, 1)]
    limits = QueueLimits(num_queued + NUM_EVENTS, 1 << 40)
    dispatcher = Dispatcher(infos, "least-num-unfinished-tokens", limits, time.monotonic)
    for i in range(num_queued):
        dispatcher.dispatch([make_request(f"q{i}")])

    def report(i: int) -> None:
        delta = Delta(request_id=f"n{i}", first_index=0, token_ids=(7,), text="x")
        dispatcher.on_report(Report(0, ReplicaLoad(), (delta,)))

    return {
        "submit": mean_us(lambda i: dispatcher.dispatch([make_request(f"n{i}")])),
        "report": mean_us(report),
        "close": mean_us(lambda i: dispatcher.close(f"n{i}")),
    }


def main() -> None:
    """Time every kind of event and print the report."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--queued", type=int, nargs="+", default=[600, 100_000])
    args = parser.parse_args()
    times: dict[str, dict[int, float]] = {}
    for num_queued in args.queued:
        for part in (time_prompts, time_offers, time_pushes, time_dispatcher):
            for event, value in part(num_queued).items():
                times.setdefault(event, {})[num_queued] = value
    print(json.dumps({"us": times}, indent=2))


if __name__ == "__main__":
    main()
