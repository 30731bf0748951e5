"""Measure how much streaming to many clients slows a prefill on the same rank, rank 0.

    python -m bench.micro.prefill_beside_streams MODEL_DIRECTORY [--prompt-tokens 8192]
        [--tokens-per-s 20000] [--streams 256] [--requests 10]

The weights are random. Prompts are prefilled one at a time on the engine as in serving. The front
end runs in the same process, on the same event loop, and streams the reports of decode replicas,
which are faked at the message level as in ``bench.micro.front_end``. The clients are in another
process. Prints one JSON object: the median prefill with an idle front end (before and after) and
beside the streams, and the token rate that the clients measured.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import multiprocessing
import random
import socket
import statistics
import time
from collections.abc import Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np
import uvloop

from bench.micro.front_end import MAX_MODEL_LEN, WORD, Feed, start_ours, tick
from serve.config.server import ServerConfig, parse_args
from serve.dispatch.service import Service
from serve.request import Request, SamplingParams, pack_ids
from serve.runtime.join import join_job
from serve.runtime.shutdown import exit_now
from serve.runtime.startup import serving_front_end
from serve.topology import read_rank_info

WARM_UPS = 2  # prefills
SETTLING_REPORTS = 20  # reports before the measurement starts


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path, help="directory with a config.json")
    parser.add_argument("--prompt-tokens", type=int, default=8192)
    parser.add_argument("--tokens-per-s", type=float, default=20_000.0, help="sum of all streams")
    parser.add_argument("--streams", type=int, default=256)
    parser.add_argument("--requests", type=int, default=10, help="number of prefills in each part")
    args = parser.parse_args(argv)
    length = args.prompt_tokens
    options = ["--model", str(args.model), "--load-format", "dummy", "--tokenizer", "none"]
    options += ["--max-model-len", str(length + 1), "--max-num-seqs", "2"]
    # Whole prompts in a step, as on a rank that only prefills.
    config = parse_args([*options, "--max-num-batched-tokens", str(max(2, length))], 1)
    print(json.dumps(uvloop.run(_measure(config, args))), flush=True)
    exit_now(0)


async def _measure(config: ServerConfig, args: argparse.Namespace) -> dict[str, Any]:
    found: dict[str, Any] = {}
    process = join_job(config, read_rank_info({}))
    async with serving_front_end(process) as front_end:
        await front_end.get_ready()
        await _measure_prefills(front_end.service, config.model_config.vocab_size, args, found)
    return found


async def _measure_prefills(
    service: Service, vocab_size: int, args: argparse.Namespace, found: dict[str, Any]
) -> None:
    engine = _Engine(service, vocab_size, args.prompt_tokens)
    await engine.prefills_ms(WARM_UPS)
    idle_ms = await engine.prefills_ms(args.requests)
    loaded = await _measure_loaded(engine, args)
    idle_ms += await engine.prefills_ms(args.requests)
    idle, beside = statistics.median(idle_ms), statistics.median(loaded.prefills_ms)
    found |= {name: getattr(args, name) for name in ("prompt_tokens", "requests", "streams")}
    found |= {
        "asked_tokens_s": args.tokens_per_s,
        "streamed_tokens_s": loaded.tokens_s,
        "fed_tokens": loaded.num_fed,
        "streamed_tokens": loaded.num_streamed,
        "lag_p99_ms": loaded.lag_p99_ms,
        "idle_prefill_ms": idle,
        "loaded_prefill_ms": beside,
        "over_idle": beside / idle,
    }


class _Engine:
    """Prefills prompts of random tokens on the rank's own replica, one at a time."""

    def __init__(self, service: Service, vocab_size: int, num_tokens: int) -> None:
        self._service, self._num_tokens = service, num_tokens
        self._vocab = range(vocab_size)
        self._rng = random.Random(0)
        self._num_requests = 0

    async def prefills_ms(self, count: int) -> list[float]:
        """Return the time from each prefill's start to its first token, on the replica's clock."""
        return [await self._prefill_ms() for _ in range(count)]

    async def _prefill_ms(self) -> float:
        self._num_requests += 1
        request = Request(
            id=f"r{self._num_requests}",
            prompt=pack_ids(self._rng.choices(self._vocab, k=self._num_tokens)),
            sampling=SamplingParams(max_tokens=1, temperature=0.0, ignore_eos=True),
        )
        async for output in self._service.submit([request])[0]:
            stamps = output.timeline
            if stamps is not None and stamps.prefill_started_s and stamps.prefill_ended_s:
                return (stamps.prefill_ended_s - stamps.prefill_started_s) * 1e3
        raise RuntimeError(f"{request.id} ended without a prefill")


class _Loaded(NamedTuple):
    """The measurement with streams."""

    prefills_ms: list[float]
    tokens_s: float  # measured by the clients, during the prefills
    lag_p99_ms: float  # of the event loop, during the prefills
    num_fed: int  # tokens given to all streams together
    num_streamed: int


async def _measure_loaded(engine: _Engine, args: argparse.Namespace) -> _Loaded:
    listener = socket.create_server(("127.0.0.1", 0), backlog=args.streams)
    runner, feed, all_open = await start_ours(listener, args.streams, 0)
    clients = _Clients(listener.getsockname()[1], args.streams)
    pacer = _Pacer(feed, args.streams / args.tokens_per_s)
    opening = asyncio.create_task(_start_when(all_open, pacer))
    before = await clients.count(SETTLING_REPORTS * args.streams)
    lags_s: list[float] = []
    ticking = asyncio.create_task(tick(lags_s))
    prefills_ms = await engine.prefills_ms(args.requests)
    after = await clients.count(0)
    ticking.cancel()
    pacer.stop()
    await opening
    num_fed = pacer.num_reports * args.streams
    last = await clients.count(num_fed)
    await clients.leave()
    await runner.cleanup()
    return _Loaded(
        prefills_ms,
        (after.num_tokens - before.num_tokens) / (after.at_s - before.at_s),
        float(np.percentile(lags_s or [0.0], 99)) * 1e3,
        num_fed,
        last.num_tokens,
    )


async def _start_when(all_open: asyncio.Event, pacer: _Pacer) -> None:
    await all_open.wait()
    pacer.start()


class _Pacer:
    """Gives every stream a token each ``period_s``; late ones follow at once."""

    def __init__(self, feed: Feed, period_s: float) -> None:
        self._feed, self._period_s = feed, period_s
        self._loop = asyncio.get_running_loop()
        self._next: asyncio.TimerHandle | None = None
        self._due_s, self.num_reports = 0.0, 0

    def start(self) -> None:
        self._due_s = self._loop.time()
        self._report()

    def stop(self) -> None:
        if self._next is not None:
            self._next.cancel()

    def _report(self) -> None:
        self._feed(self.num_reports)
        self.num_reports += 1
        self._due_s += self._period_s
        self._next = self._loop.call_at(self._due_s, self._report)


# --- the clients, in another process ------------------------------------------------------------


class _Count(NamedTuple):
    """The tokens of all clients together at a time of their clock."""

    num_tokens: int
    at_s: float


class _Clients:
    """Controls the clients' process."""

    def __init__(self, port: int, num_streams: int) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, client_pipe = context.Pipe()
        args = client_pipe, port, num_streams
        self._process = context.Process(target=_run_clients, args=args, daemon=True)
        self._process.start()
        client_pipe.close()  # otherwise the death of the clients would not end the pipe

    async def count(self, min_tokens: int) -> _Count:
        """Wait for ``min_tokens`` tokens. Raises ``EOFError`` if the clients have died."""
        self._pipe.send(min_tokens)
        found: _Count = await asyncio.to_thread(self._pipe.recv)
        return found

    async def leave(self) -> None:
        """Close all connections and end the process."""
        self._pipe.send(None)
        await asyncio.to_thread(self._process.join)


def _run_clients(pipe: Connection, port: int, num_streams: int) -> None:
    uvloop.run(_read_streams(pipe, port, num_streams))


async def _read_streams(pipe: Connection, port: int, num_streams: int) -> None:
    """Read ``num_streams`` streams and answer the queries of ``_Clients`` until it leaves."""
    loop = asyncio.get_running_loop()
    tally = _Tally(pipe)
    loop.add_reader(pipe.fileno(), tally.on_query)
    request = _request()
    for _ in range(num_streams):
        await loop.create_connection(lambda: _Reader(request, tally), "127.0.0.1", port)
    await tally.leave


def _request() -> bytes:
    body = json.dumps(
        {"prompt": [1], "max_tokens": MAX_MODEL_LEN // 2, "stream": True, "ignore_eos": True}
    ).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n"
    return head.encode() + b"Content-Type: application/json\r\n\r\n" + body


class _Tally:
    """Counts the tokens of all clients and answers a query when enough have come."""

    def __init__(self, pipe: Connection) -> None:
        self._pipe = pipe
        self._num_tokens = 0
        self._min_tokens: int | None = None  # of the open query
        self.leave: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def add(self, num_tokens: int) -> None:
        self._num_tokens += num_tokens
        self._answer()

    def on_query(self) -> None:
        self._min_tokens = self._pipe.recv()
        if self._min_tokens is None:
            self.leave.set_result(None)
        self._answer()

    def _answer(self) -> None:
        if self._min_tokens is not None and self._num_tokens >= self._min_tokens:
            self._min_tokens = None
            self._pipe.send(_Count(self._num_tokens, time.perf_counter()))


class _Reader(asyncio.Protocol):
    """One connection. It sends a request and counts tokens."""

    def __init__(self, request: bytes, tally: _Tally) -> None:
        self._request, self._tally, self._rest = request, tally, b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        cast(asyncio.Transport, transport).write(self._request)

    def data_received(self, data: bytes) -> None:
        """Count tokens, also one that is split over two reads."""
        seen = self._rest + data
        self._tally.add(seen.count(WORD))
        self._rest = seen[-len(WORD) + 1 :]

    def connection_lost(self, error: Exception | None) -> None:
        """Fail if a stream ends before the clients leave."""
        if not self._tally.leave.done():
            self._tally.leave.set_exception(error or ConnectionError("a stream has ended"))


if __name__ == "__main__":
    main()
