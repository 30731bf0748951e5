"""Floods: what an unfriendly or broken client sends, beside the traffic of others.

The server may refuse any of it. It must not answer wrongly, stall, or fail others for it. Floods
come from an address of their own where the server is on this host.
"""

from __future__ import annotations

import asyncio
import random
import socket
import struct
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Any

import aiohttp
import msgspec

from bench.soak.answers import Answer, Checker, WrongAnswer
from bench.soak.client import Refused, Target, check_status, read_error
from bench.soak.recipes import CHAT, COMPLETIONS, Recipe, greedy
from bench.soak.tally import Tally
from bench.soak.traffic import FAILURES

FLOOD_STALL_S = 120.0
_FEW_TOKENS = 3
_NEW_CLIENT_S = 20.0  # for the request of a client without a connection
_COPIES = 3  # of each large body
_SLOW_CHOICES, _SLOW_TOKENS = 16, 200  # answers of about a megabyte, beyond any socket's buffer
_BURST_N = 4
_RESET = struct.pack("ii", 1, 0)  # SO_LINGER of 0 s: close() resets the connection


@dataclass(frozen=True, slots=True)
class Flooder:
    """Sends every flood to ``target``. The other fields give their sizes."""

    target: Target
    max_waiting: int
    body_bytes: int
    num_half_open: int
    num_slow: int
    hold_s: float  # how long idle connections are held

    async def run(self, tally: Tally, rng: random.Random) -> None:
        """Send every flood once, in random order."""
        for name in rng.sample(sorted(FLOODS), len(FLOODS)):
            with tally.flood(name) as outcomes:
                try:
                    async with asyncio.timeout(FLOOD_STALL_S):
                        await FLOODS[name](self, outcomes, rng)
                except (WrongAnswer, TimeoutError) as error:
                    tally.add_wrong(f"flood {name}: {type(error).__name__}: {error}")


async def _large_bodies(flooder: Flooder, outcomes: Counter[str], rng: random.Random) -> None:
    """Send bodies of several MiB: of text, of ids, and of a field that is not ours."""
    size = flooder.body_bytes
    text = " ".join(rng.choices(("word", "and", "another", "one"), k=16)) + " "
    long_text = text * (size // len(text))
    ids = rng.choices(range(256), k=1024) * (size // 4096)
    bodies: list[tuple[str, Mapping[str, Any]]] = [
        (COMPLETIONS, {"prompt": [1], "max_tokens": 1, "x": [[]] * (size // 4)}),
        (COMPLETIONS, {"prompt": long_text, "max_tokens": 1}),
        (COMPLETIONS, {"prompt": ids, "max_tokens": 1}),
        (CHAT, {"messages": [{"role": "user", "content": long_text}], "max_tokens": 1}),
        ("/tokenize", {"prompt": long_text}),
    ]
    encoded = [(path, msgspec.json.encode(body)) for path, body in bodies] * _COPIES
    async with flooder.target.session(flood=True) as session:
        await asyncio.gather(
            *(_outcome(outcomes, _post_large(session, path, body)) for path, body in encoded)
        )


async def _post_large(session: aiohttp.ClientSession, path: str, body: bytes) -> str:
    async with session.post(path, data=body) as response:
        if response.status == 200:
            await response.read()
        else:
            await read_error(response)
        if response.status >= 500 and response.status != 503:
            raise WrongAnswer(f"status {response.status} for a body of {len(body)} bytes")
        return str(response.status)


async def _half_open(flooder: Flooder, outcomes: Counter[str], rng: random.Random) -> None:
    """Open connections, send a part of a head on each, and hold them."""
    head = flooder.target.head(COMPLETIONS, 100)
    await _hold(
        flooder,
        outcomes,
        [head[: rng.randint(0, len(head) - 3)] for _ in range(flooder.num_half_open)],
    )


async def _slow_readers(flooder: Flooder, outcomes: Counter[str], rng: random.Random) -> None:
    """Ask for long streams and read nothing of them."""
    requests = []
    for _ in range(flooder.num_slow):
        body = greedy(rng, _SLOW_TOKENS, _SLOW_CHOICES) | {"stream": True}
        data = msgspec.json.encode(body)
        requests.append(flooder.target.head(COMPLETIONS, len(data)) + data)
    await _hold(flooder, outcomes, requests)


async def _hold(flooder: Flooder, outcomes: Counter[str], requests: list[bytes]) -> None:
    """Send each of ``requests`` on a connection of its own, hold all for a while, reset them."""
    loop = asyncio.get_running_loop()
    sockets: list[socket.socket] = []
    try:
        for request in requests:
            one = socket.socket()
            sockets.append(one)
            one.setblocking(False)
            one.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            one.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
            if (address := flooder.target.flood_address) is not None:
                one.bind(address)
            try:
                await loop.sock_connect(one, (flooder.target.host, flooder.target.port))
                await loop.sock_sendall(one, request)
                outcomes["held"] += 1
            except OSError:
                outcomes["not taken"] += 1
        await asyncio.gather(asyncio.sleep(flooder.hold_s), _ask_newly(flooder.target, outcomes))
    finally:
        for one in sockets:
            one.close()


async def _ask_newly(target: Target, outcomes: Counter[str]) -> None:
    """Send a request over a new connection. It must be answered."""
    body = greedy(random.Random(1), _FEW_TOKENS)
    try:
        async with asyncio.timeout(_NEW_CLIENT_S), target.session() as session:
            status = await _post_checked(session, body)
    except Refused as refused:
        status = str(refused.status)
    except FAILURES as error:
        raise WrongAnswer(f"a new client got {type(error).__name__}: {error}") from None
    outcomes[f"new client {status}"] += 1


async def _many_choices(flooder: Flooder, outcomes: Counter[str], rng: random.Random) -> None:
    """Send calls of 128 choices each."""
    await _burst(flooder, outcomes, [greedy(rng, _FEW_TOKENS, 128) for _ in range(6)])


async def _beyond_waiting(flooder: Flooder, outcomes: Counter[str], rng: random.Random) -> None:
    """Send twice as many requests at once as may wait."""
    count = -(-2 * flooder.max_waiting // _BURST_N)
    await _burst(flooder, outcomes, [greedy(rng, _FEW_TOKENS, _BURST_N) for _ in range(count)])


async def _burst(flooder: Flooder, outcomes: Counter[str], bodies: list[dict[str, Any]]) -> None:
    async with flooder.target.session(flood=True) as session:
        await asyncio.gather(*(_outcome(outcomes, _post_checked(session, body)) for body in bodies))


async def _post_checked(session: aiohttp.ClientSession, body: dict[str, Any]) -> str:
    recipe = Recipe(0, COMPLETIONS, body)
    async with session.post(recipe.path, json=body) as response:
        await check_status(response)
        answer = Answer()
        answer.add(await response.json())
    Checker().check(recipe, answer)
    return "200"


async def _outcome(outcomes: Counter[str], sending: Awaitable[str]) -> None:
    """Count how ``sending`` ends. A connection that the server closed is an outcome."""
    try:
        outcomes[await sending] += 1
    except Refused as refused:
        outcomes[str(refused.status)] += 1
    except WrongAnswer:
        raise
    except FAILURES:
        outcomes["closed"] += 1


FLOODS: Mapping[str, Callable[[Flooder, Counter[str], random.Random], Awaitable[None]]] = {
    "large bodies": _large_bodies,
    "half-open connections": _half_open,
    "slow readers": _slow_readers,
    "n = 128": _many_choices,
    "beyond max-waiting": _beyond_waiting,
}
