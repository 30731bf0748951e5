"""Measure what large bodies in work cost small requests, /metrics, running streams and memory.

    python -m bench.micro.big_bodies [--bodies 10] [--mib 3] [--streams 16]

The front end runs alone, with fake replicas, SmolLM2's tokenizer and the switch interval of a
rank; clients are in another process. The bodies are posted to /tokenize, which does the most work:
nothing is refused. Each figure is taken alone and while all bodies are in work. Prints one JSON
object.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import multiprocessing
import resource
import socket
import sys
import time
from collections.abc import Sequence
from multiprocessing.connection import Connection
from typing import Any

import aiohttp
import numpy as np
import uvloop

from serve.api.app import create_app, run_app_on
from serve.api.settings import ApiSettings
from serve.config.model_source import default_model
from serve.dispatch.admission import QueueLimits
from serve.dispatch.dispatcher import Dispatcher
from serve.dispatch.metrics import Metrics
from serve.dispatch.service import Service
from serve.protocol.messages import AnyMessage, Delta, Prefill, ReplicaLoad, Report
from serve.request import FinishReason
from serve.tokenizer.tokenizer import load_tokenizer
from serve.topology import ReplicaSpec, build_topology

MAX_MODEL_LEN = 8192
_STEP_S = 0.02  # of the fake replica, so that a stream's gap is this long when nothing disturbs
_ALONE_S = 3.0
_SWITCH_S = 1e-4  # as in a rank


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--bodies", type=int, default=10)
    parser.add_argument("--mib", type=float, default=3.0, help="size of each body")
    parser.add_argument("--streams", type=int, default=16)
    args = parser.parse_args(argv)
    sys.setswitchinterval(_SWITCH_S)
    print(json.dumps(uvloop.run(_measure(args.bodies, int(args.mib * 2**20), args.streams))))


async def _measure(num_bodies: int, num_bytes: int, num_streams: int) -> dict[str, float]:
    listener = socket.create_server(("127.0.0.1", 0), backlog=256)
    replica = _FakeReplica()
    path = default_model().path
    settings = ApiSettings(("model",), path, 49152, 0)
    tokenizer = load_tokenizer(path, path, None)
    app = create_app(replica.service, tokenizer, replica.metrics, settings)
    runner = await run_app_on(app, listener)
    stepping = asyncio.create_task(replica.run())
    context = multiprocessing.get_context("spawn")
    pipe, client_pipe = context.Pipe()
    port = listener.getsockname()[1]
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    client = context.Process(
        target=_run_client, args=(client_pipe, port, num_bodies, num_bytes, num_streams)
    )
    client.start()
    found: dict[str, float] = await asyncio.to_thread(pipe.recv)
    client.join()
    stepping.cancel()
    await runner.cleanup()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return found | {"peak_memory_mib": (peak - before) / 1024}


class _FakeReplica:
    """Gives every open request a token a step, until its ``max_tokens``."""

    def __init__(self) -> None:
        topology = build_topology((ReplicaSpec(1), ReplicaSpec(1)), 1, mixed=False)
        self.metrics = Metrics("model")
        dispatcher = Dispatcher(
            topology.replicas, "round-robin", QueueLimits(4096, 1 << 23), time.monotonic
        )
        self.service = Service(dispatcher, self._send, self.metrics, time.monotonic)
        self.service.set_ready(MAX_MODEL_LEN)
        self._open: dict[str, tuple[int, int]] = {}  # tokens so far, and in all

    def _send(self, rank: int, message: AnyMessage) -> None:
        if isinstance(message, Prefill):
            for request, _ in message.requests:
                self._open[request.id] = (0, request.sampling.max_tokens)
        else:
            self._open.pop(getattr(message, "request_id", ""), None)

    async def run(self) -> None:
        """Step at a fixed pace; a step that the event loop runs late shows in the gaps."""
        due_s = time.monotonic()
        while True:
            due_s = max(due_s + _STEP_S, time.monotonic())
            await asyncio.sleep(due_s - time.monotonic())
            for replica_id, first in ((0, True), (1, False)):
                ids = [i for i, (count, _) in self._open.items() if (count == 0) == first]
                deltas = tuple(self._token(request_id) for request_id in ids)
                self.service.on_report(
                    Report(replica_id, ReplicaLoad(num_blocks=1), deltas, len(ids))
                )

    def _token(self, request_id: str) -> Delta:
        count, total = self._open[request_id]
        last = count + 1 == total
        if last:
            del self._open[request_id]
        else:
            self._open[request_id] = (count + 1, total)
        reason = FinishReason.LENGTH if last else None
        return Delta(
            request_id=request_id,
            first_index=count,
            token_ids=(7,),
            text=" word",
            finish_reason=reason,
        )


# --- the clients, in another process ------------------------------------------------------------


def _run_client(pipe: Connection, port: int, *sizes: int) -> None:
    pipe.send(asyncio.run(_client(f"http://127.0.0.1:{port}", *sizes)))


async def _client(url: str, num_bodies: int, num_bytes: int, num_streams: int) -> dict[str, float]:
    text = "The quick brown fox jumps over the lazy dog. "
    body = json.dumps({"prompt": text * (num_bytes // len(text))}).encode()
    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(url, connector=connector) as http:
        gaps = _Gaps()
        streams = [asyncio.create_task(gaps.read(http)) for _ in range(num_streams)]
        alone = await _probe(http, gaps, asyncio.create_task(asyncio.sleep(_ALONE_S)))
        started_s = time.perf_counter()
        bodies = asyncio.gather(*(_post(http, body) for _ in range(num_bodies)))
        beside = await _probe(http, gaps, bodies)
        bodies_s = time.perf_counter() - started_s
        for stream in streams:
            stream.cancel()
    found = {f"{name}_alone_ms": value for name, value in alone.items()}
    found |= {f"{name}_beside_ms": value for name, value in beside.items()}
    found["small_ratio"] = beside["small_p50"] / alone["small_p50"]
    found["itl_p99_ratio"] = beside["itl_p99"] / alone["itl_p99"]
    return found | {"bodies_s": bodies_s}


async def _probe(
    http: aiohttp.ClientSession, gaps: _Gaps, until: asyncio.Future[Any]
) -> dict[str, float]:
    """Time small requests and /metrics one after another until ``until`` is done."""
    small, metrics = [], []
    gaps.seen.clear()
    ask = {"prompt": "Hello", "max_tokens": 4}
    while not until.done():
        started_s = time.perf_counter()
        async with http.post("/v1/completions", json=ask) as response:
            await response.read()
        small.append(time.perf_counter() - started_s)
        started_s = time.perf_counter()
        async with http.get("/metrics") as response:
            await response.read()
        metrics.append(time.perf_counter() - started_s)
    return {
        "small_p50": float(np.percentile(small, 50)) * 1e3,
        "small_p99": float(np.percentile(small, 99)) * 1e3,
        "metrics_p50": float(np.percentile(metrics, 50)) * 1e3,
        "metrics_max": max(metrics) * 1e3,
        "itl_p99": float(np.percentile(gaps.seen, 99)) * 1e3,
    }


class _Gaps:
    """The times between two pieces of each stream."""

    def __init__(self) -> None:
        self.seen: list[float] = []

    async def read(self, http: aiohttp.ClientSession) -> None:
        """Read streams, one after another, until cancelled."""
        ask = {"prompt": "Hello", "max_tokens": 8000, "stream": True}
        while True:
            async with http.post("/v1/completions", json=ask) as response:
                before_s = time.perf_counter()
                async for _ in response.content.iter_any():
                    now_s = time.perf_counter()
                    self.seen.append(now_s - before_s)
                    before_s = now_s


async def _post(http: aiohttp.ClientSession, body: bytes) -> None:
    async with http.post("/tokenize", data=body) as response:
        assert response.status == 200, await response.text()
        async for _ in response.content.iter_any():
            pass


if __name__ == "__main__":
    main()
