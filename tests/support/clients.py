"""Client: requests to a running server, its event streams, and waiting until it is idle or busy."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import AsyncIterator, Callable
from typing import Any
from urllib.parse import urlsplit

import aiohttp

from tests.support.cases import at_rest

REST_S = 30.0

Replicas = list[dict[str, Any]]


class Client:
    """A session with one server."""

    def __init__(self, session: aiohttp.ClientSession, url: str) -> None:
        self.session = session
        self.url = url

    async def ask(self, prompt_ids: list[int], max_tokens: int, **fields: Any) -> dict[str, Any]:
        """Send a greedy completion of ``max_tokens`` tokens and return the answer's body."""
        body = greedy_body(prompt_ids, max_tokens) | fields
        async with self.session.post(f"{self.url}/v1/completions", json=body) as response:
            answer: dict[str, Any] = await response.json()
            assert response.status == 200, answer
            return answer

    async def open_stream(
        self, prompt_ids: list[int], max_tokens: int, **fields: Any
    ) -> aiohttp.ClientResponse:
        """Open a greedy stream and read its first event; ``events`` yields the others."""
        body = greedy_body(prompt_ids, max_tokens) | {"stream": True} | fields
        response = await self.session.post(f"{self.url}/v1/completions", json=body)
        assert response.status == 200, await response.text()
        await anext(events(response))
        return response

    async def cluster(self) -> Replicas:
        """Return the replicas of ``GET /cluster``."""
        async with self.session.get(f"{self.url}/cluster") as response:
            replicas: Replicas = (await response.json())["replicas"]
            return replicas

    async def rest(self, timeout_s: float = REST_S) -> Replicas:
        """Wait until the cluster is idle and every block is free. Return its replicas."""
        return await self._wait_until(at_rest, timeout_s)

    async def busy(self, replica: int, timeout_s: float = REST_S) -> None:
        """Wait until one of the cluster's replicas runs a request."""
        await self._wait_until(lambda replicas: bool(replicas[replica]["num_running"]), timeout_s)

    async def _wait_until(
        self, condition: Callable[[Replicas], bool], timeout_s: float
    ) -> Replicas:
        """Read the cluster's state until ``condition`` holds.

        The server pushes no state, so this reads it again as soon as the last answer has come: the
        round trips set the pace.
        """
        replicas: Replicas = []
        try:
            async with asyncio.timeout(timeout_s):
                while not condition(replicas := await self.cluster()):
                    pass
        except TimeoutError:
            raise AssertionError(f"still waiting after {timeout_s} s: {replicas}") from None
        return replicas

    async def metric(self, name: str) -> float:
        """Return the sum of one metric over its labels."""
        async with self.session.get(f"{self.url}/metrics") as response:
            text = await response.text()
        values = re.findall(rf"^{re.escape(name)}(?:\{{.*\}})? (\S+)$", text, re.MULTILINE)
        assert values, f"no metric {name} in\n{text}"
        return sum(map(float, values))


def greedy_body(prompt_ids: list[int], max_tokens: int) -> dict[str, Any]:
    """Return a completion that runs to ``max_tokens``, with the token ids in the answer."""
    return {
        "prompt": prompt_ids,
        "max_tokens": max_tokens,
        "temperature": 0.0,
        "ignore_eos": True,
        "return_token_ids": True,
    }


async def events(response: aiohttp.ClientResponse) -> AsyncIterator[dict[str, Any]]:
    """Yield the server-sent events before ``[DONE]``, which must end the stream."""
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
    """Send a request on a new connection, which the test may then close or abort."""
    parts = urlsplit(url)
    reader, writer = await asyncio.open_connection(parts.hostname, parts.port)
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: {parts.netloc}\r\nContent-Type: application/json\r\n"
    writer.write(head.encode() + f"Content-Length: {len(data)}\r\n\r\n".encode() + data)
    await writer.drain()
    return reader, writer
