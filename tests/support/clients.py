"""What clients of a running server do in tests: ask, read event streams, hang up, watch it rest."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import AsyncIterator
from typing import Any
from urllib.parse import urlsplit

import aiohttp

from tests.support.cases import at_rest

REST_S = 30.0
_LOOK_S = 0.02


class Client:
    """A session with one server."""

    def __init__(self, session: aiohttp.ClientSession, url: str) -> None:
        self.session = session
        self.url = url

    async def ask(self, prompt_ids: list[int], max_tokens: int, **fields: Any) -> dict[str, Any]:
        """A greedy completion that runs to ``max_tokens``; the answer's body."""
        body = greedy_body(prompt_ids, max_tokens) | fields
        async with self.session.post(f"{self.url}/v1/completions", json=body) as response:
            answer: dict[str, Any] = await response.json()
            assert response.status == 200, answer
            return answer

    async def open_stream(self, prompt_ids: list[int], max_tokens: int) -> aiohttp.ClientResponse:
        """A streamed greedy completion whose first event is read; ``events`` has the others."""
        body = greedy_body(prompt_ids, max_tokens) | {"stream": True}
        response = await self.session.post(f"{self.url}/v1/completions", json=body)
        assert response.status == 200, await response.text()
        await anext(events(response))
        return response

    async def cluster(self) -> list[dict[str, Any]]:
        """The replicas of ``GET /cluster``."""
        async with self.session.get(f"{self.url}/cluster") as response:
            replicas: list[dict[str, Any]] = (await response.json())["replicas"]
            return replicas

    async def rest(self, timeout_s: float = REST_S) -> list[dict[str, Any]]:
        """Look at the cluster until it is idle and every block is free."""
        replicas: list[dict[str, Any]] = []
        try:
            async with asyncio.timeout(timeout_s):
                while not at_rest(replicas := await self.cluster()):
                    await asyncio.sleep(_LOOK_S)
        except TimeoutError:
            raise AssertionError(f"not at rest after {timeout_s} s: {replicas}") from None
        return replicas

    async def busy(self, replica: int, timeout_s: float = REST_S) -> None:
        """Look at the cluster until one of its replicas computes something."""
        async with asyncio.timeout(timeout_s):
            while not (await self.cluster())[replica]["num_running"]:
                await asyncio.sleep(_LOOK_S)

    async def metric(self, name: str) -> float:
        """The sum of one metric over its labels."""
        async with self.session.get(f"{self.url}/metrics") as response:
            text = await response.text()
        values = re.findall(rf"^{re.escape(name)}(?:\{{.*\}})? (\S+)$", text, re.MULTILINE)
        assert values, f"no metric {name} in\n{text}"
        return sum(map(float, values))


def greedy_body(prompt_ids: list[int], max_tokens: int) -> dict[str, Any]:
    """A completion of token ids that runs to ``max_tokens``, with the ids in the answer."""
    return {
        "prompt": prompt_ids,
        "max_tokens": max_tokens,
        "temperature": 0.0,
        "ignore_eos": True,
        "return_token_ids": True,
    }


async def events(response: aiohttp.ClientResponse) -> AsyncIterator[dict[str, Any]]:
    """The server-sent events up to ``[DONE]``, which must be the last thing in the stream."""
    async for line in response.content:
        if not line.strip():
            continue
        data = line.decode().removeprefix("data: ").strip()
        if data == "[DONE]":
            assert not (rest := await response.content.read()).strip(), rest
            return
        yield json.loads(data)
    raise AssertionError("the stream ended without [DONE]")


async def post_raw(
    url: str, path: str, body: dict[str, Any] | bytes
) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """Send a request on a connection of its own, of which the test may do what it likes."""
    parts = urlsplit(url)
    reader, writer = await asyncio.open_connection(parts.hostname, parts.port)
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: {parts.netloc}\r\nContent-Type: application/json\r\n"
    writer.write(head.encode() + f"Content-Length: {len(data)}\r\n\r\n".encode() + data)
    await writer.drain()
    return reader, writer
