"""Measure the tokens/s that the front end streams, and those of a bare aiohttp handler.

    python -m bench.micro.front_end [--streams 256] [--tokens 400]

The replicas are faked at the message level: reports go in as bytes of the control channel, and
server-sent events go out to clients in another process. Both servers send every client one event a
step; the next step starts when all events have been written. Both are measured in the same run, in
turns. Prints one JSON object.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import multiprocessing
import socket
import time
from collections.abc import Awaitable, Callable, Sequence
from multiprocessing.connection import Connection
from typing import Any, cast

import numpy as np
import uvloop
from aiohttp import web

from serve.api.app import create_app, run_app_on
from serve.api.settings import ApiSettings
from serve.dispatch.admission import QueueLimits
from serve.dispatch.dispatcher import Dispatcher
from serve.dispatch.metrics import Metrics
from serve.dispatch.service import Service
from serve.protocol.messages import AnyMessage, Delta, Prefill, ReplicaLoad, Report, decode, encode
from serve.topology import ReplicaSpec, build_topology

MAX_MODEL_LEN = 1 << 20
_TICK_S = 0.005
_NUM_YIELDS = 4  # iterations of the event loop in which a step's events are written
_ROUNDS = 3
WORD = b" word"  # the text of every token


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--streams", type=int, default=256)
    parser.add_argument("--tokens", type=int, default=400, help="tokens of each stream")
    args = parser.parse_args(argv)
    ours, bare = [], []
    for _ in range(_ROUNDS):
        ours.append(uvloop.run(_measure(start_ours, args.streams, args.tokens)))
        bare.append(uvloop.run(_measure(_start_bare, args.streams, args.tokens)))
    rate, bare_rate = (float(np.median([run["tokens_s"] for run in runs])) for runs in (ours, bare))
    found = {
        "streams": args.streams,
        "tokens_s": rate,
        "bare_tokens_s": bare_rate,
        "over_bare": rate / bare_rate,
        "lag_p99_ms": max(run["lag_p99_ms"] for run in ours),
        "events_per_token": min(run["events_per_token"] for run in ours),
        "event_bytes": ours[0]["event_bytes"],
    }
    print(json.dumps(found))


Feed = Callable[[int], None]  # gives every stream the event of a step
Start = Callable[[socket.socket, int, int], Awaitable[tuple[web.AppRunner, Feed, asyncio.Event]]]


async def _measure(start: Start, num_streams: int, num_tokens: int) -> dict[str, float]:
    listener = socket.create_server(("127.0.0.1", 0), backlog=num_streams)
    runner, feed, all_open = await start(listener, num_streams, num_tokens)
    context = multiprocessing.get_context("spawn")
    pipe, client_pipe = context.Pipe()
    port = listener.getsockname()[1]
    client = context.Process(
        target=_read_streams, args=(client_pipe, port, num_streams, num_tokens)
    )
    client.start()
    await all_open.wait()
    lags_s: list[float] = []
    ticking = asyncio.create_task(tick(lags_s))
    started_s = time.perf_counter()
    for step in range(num_tokens):
        feed(step)
        for _ in range(_NUM_YIELDS):
            await asyncio.sleep(0)
    num_events, num_bytes = await asyncio.to_thread(pipe.recv)
    elapsed_s = time.perf_counter() - started_s
    ticking.cancel()
    client.join()
    await runner.cleanup()
    count = num_streams * num_tokens
    return {
        "tokens_s": count / elapsed_s,
        "lag_p99_ms": float(np.percentile(lags_s or [0.0], 99)) * 1e3,
        "events_per_token": num_events / count,
        "event_bytes": num_bytes / num_events,
    }


async def tick(lags_s: list[float]) -> None:
    """Append how late the event loop runs a timer, again and again, until cancelled."""
    while True:
        due_s = time.perf_counter() + _TICK_S
        await asyncio.sleep(_TICK_S)
        lags_s.append(max(0.0, time.perf_counter() - due_s))  # timers may be 1 ms early


async def start_ours(
    listener: socket.socket, num_streams: int, num_tokens: int
) -> tuple[web.AppRunner, Feed, asyncio.Event]:
    topology = build_topology((ReplicaSpec(1), ReplicaSpec(1)), 1, mixed=False)
    ids: list[str] = []
    all_open = asyncio.Event()

    def send(rank: int, message: AnyMessage) -> None:
        if isinstance(message, Prefill):
            ids.extend(choice.request_id for choice in message.choices)
            if len(ids) == num_streams:
                all_open.set()

    policy, limits = "least-num-unfinished-tokens", QueueLimits(2 * num_streams, 1 << 30)
    dispatcher = Dispatcher(topology.replicas, policy, limits, time.monotonic)
    metrics = Metrics("model")
    service = Service(dispatcher, send, metrics, time.monotonic)
    service.set_ready(MAX_MODEL_LEN)
    settings = ApiSettings(("model",), "model", 1000, 0)
    runner = await run_app_on(create_app(service, None, metrics, settings), listener)

    def feed(step: int) -> None:
        # Decoded as on the control channel. Encoding is the replica's work, but its time is
        # included here: 0.3 us a token.
        report = decode(encode(_report(ids, step)))
        assert isinstance(report, Report)
        service.on_report(report)

    return runner, feed, all_open


def _report(ids: list[str], step: int) -> Report:
    deltas = (
        Delta(request_id=i, first_index=step, token_ids=(7,), text=WORD.decode()) for i in ids
    )
    return Report(1 if step else 0, ReplicaLoad(num_blocks=1), tuple(deltas), len(ids))


async def _start_bare(
    listener: socket.socket, num_streams: int, num_tokens: int
) -> tuple[web.AppRunner, Feed, asyncio.Event]:
    """Start handlers that write fixed bytes, as many as our event has, at each ``feed``."""
    event = b"data: " + json.dumps(_event_like_ours()).encode() + b"\n\n"
    queues: list[asyncio.Queue[bytes]] = []
    all_open = asyncio.Event()

    async def answer(http: web.Request) -> web.StreamResponse:
        await http.read()
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(http)
        queue: asyncio.Queue[bytes] = asyncio.Queue()
        queues.append(queue)
        if len(queues) == num_streams:
            all_open.set()
        for _ in range(num_tokens):
            await response.write(await queue.get())
        await response.write_eof()
        return response

    app = web.Application()
    app.router.add_post("/v1/completions", answer)

    def feed(step: int) -> None:
        for queue in queues:
            queue.put_nowait(event)

    runner = web.AppRunner(app, handler_cancellation=True, access_log=None)
    await runner.setup()
    await web.SockSite(runner, listener).start()
    return runner, feed, all_open


def _event_like_ours() -> dict[str, Any]:
    choice = {"index": 0, "text": WORD.decode(), "logprobs": None, "finish_reason": None}
    head = {"id": "cmpl-" + 32 * "0", "object": "text_completion", "created": 1_700_000_000}
    return head | {"model": "model", "choices": [choice]}


# --- the clients, in another process ------------------------------------------------------------


class _Reader(asyncio.Protocol):
    """One connection. It sends a request and counts events and tokens until all have come."""

    def __init__(self, request: bytes, num_tokens: int) -> None:
        self._request, self._missing = request, num_tokens
        self._rest = b""
        self.num_events = self.num_bytes = 0
        self.done = asyncio.get_running_loop().create_future()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        cast(asyncio.Transport, transport).write(self._request)

    def data_received(self, data: bytes) -> None:
        """Count in whole lines only, because a read may end inside an event."""
        self.num_bytes += len(data)
        lines, found, rest = (self._rest + data).rpartition(b"\n")
        self._rest = rest
        self.num_events += lines.count(b"data: ")
        self._missing -= lines.count(WORD)
        if found and self._missing <= 0 and not self.done.done():
            self.done.set_result(None)

    def connection_lost(self, error: Exception | None) -> None:
        """Fail if tokens are missing."""
        if not self.done.done():
            self.done.set_exception(ConnectionError(f"{self._missing} tokens are missing"))


def _read_streams(pipe: Connection, port: int, num_streams: int, num_tokens: int) -> None:
    body = json.dumps(
        {"prompt": [1], "max_tokens": num_tokens + 1, "stream": True, "ignore_eos": True}
    ).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n"
    request = head.encode() + b"Content-Type: application/json\r\n\r\n" + body
    pipe.send(uvloop.run(_read_all(port, request, num_streams, num_tokens)))


async def _read_all(
    port: int, request: bytes, num_streams: int, num_tokens: int
) -> tuple[int, int]:
    loop = asyncio.get_running_loop()
    readers = []
    for _ in range(num_streams):
        _, reader = await loop.create_connection(
            lambda: _Reader(request, num_tokens), "127.0.0.1", port
        )
        readers.append(reader)
    await asyncio.gather(*(reader.done for reader in readers))
    num_events = sum(reader.num_events for reader in readers)
    return num_events, sum(reader.num_bytes for reader in readers)


if __name__ == "__main__":
    main()
