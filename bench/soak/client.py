"""Client: sends a request to the server under test and reads the answer, or part of it."""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

import aiohttp

from bench.soak.answers import Answer, WrongAnswer
from bench.soak.recipes import Recipe

_FLOOD_ADDRESS = "127.0.0.2"  # another client, where limits are per address
_ERROR_FIELDS = {"message", "type", "param", "code"}
HANG_UPS = ("connected", "half a head", "head", "half a body", "body", "first bytes")


class Refused(Exception):
    """The server refused a request with 429 or 503, as it should when it is full."""

    def __init__(self, status: int) -> None:
        super().__init__(f"refused with {status}")
        self.status = status


@dataclass(frozen=True, slots=True)
class Target:
    """The address of the server under test."""

    url: str
    api_key: str | None = None

    @property
    def host(self) -> str:
        return urlsplit(self.url).hostname or ""

    @property
    def port(self) -> int:
        return urlsplit(self.url).port or 80

    @property
    def headers(self) -> dict[str, str]:
        """The headers of every request."""
        key = {"Authorization": f"Bearer {self.api_key}"} if self.api_key else {}
        return {"Content-Type": "application/json", **key}

    @property
    def flood_address(self) -> tuple[str, int] | None:
        """The local address that floods come from; None: any, because the server is elsewhere."""
        return (_FLOOD_ADDRESS, 0) if self.host == "127.0.0.1" else None

    def session(self, *, flood: bool = False) -> aiohttp.ClientSession:
        """Make a session with as many connections as there are requests, and no time limit."""
        connector = aiohttp.TCPConnector(limit=0, local_addr=self.flood_address if flood else None)
        return aiohttp.ClientSession(
            self.url,
            connector=connector,
            headers=self.headers,
            timeout=aiohttp.ClientTimeout(total=None),
        )

    def head(self, path: str, num_bytes: int) -> bytes:
        """Return the head of a POST with a body of ``num_bytes``."""
        fields = {"Host": f"{self.host}:{self.port}", "Content-Length": num_bytes, **self.headers}
        lines = [f"POST {path} HTTP/1.1", *(f"{name}: {value}" for name, value in fields.items())]
        return ("\r\n".join(lines) + "\r\n\r\n").encode()


async def read_whole(
    session: aiohttp.ClientSession, recipe: Recipe, extra: Mapping[str, Any]
) -> Answer:
    """Send a recipe and read its whole answer. Raises ``Refused`` or ``WrongAnswer``."""
    answer = Answer()
    async with session.post(recipe.path, json=recipe.body | dict(extra)) as response:
        await check_status(response)
        answer.add(await response.json())
    return answer


async def read_stream(
    session: aiohttp.ClientSession, recipe: Recipe, *, stop_after: int | None
) -> Answer:
    """Send a recipe and read its stream, or close it after ``stop_after`` events.

    Raises ``Refused`` or ``WrongAnswer``.
    """
    answer = Answer()
    options = {"stream": True, "stream_options": {"include_usage": True}}
    num_events = 0
    async with session.post(recipe.path, json=recipe.body | options) as response:
        await check_status(response)
        async for event in events(response):
            if stop_after is not None and num_events >= stop_after:
                response.close()
                break
            answer.add(event)
            num_events += 1
    return answer


async def hang_up(target: Target, recipe: Recipe, rng: random.Random) -> str:
    """Open a connection, send a part of a request, and close or reset it. Return the phase."""
    phase = rng.choice(HANG_UPS)
    body = json.dumps(recipe.body | {"stream": rng.random() < 0.5}).encode()
    head = target.head(recipe.path, len(body))
    sent = {
        "connected": b"",
        "half a head": head[: len(head) // 2],
        "head": head,
        "half a body": head + body[: len(body) // 2],
    }.get(phase, head + body)
    reader, writer = await asyncio.open_connection(target.host, target.port)
    writer.write(sent)
    await writer.drain()
    if phase == "first bytes":
        await reader.read(rng.choice((1, 100, 1000)))
    if rng.random() < 0.5:
        writer.transport.abort()
    else:
        writer.close()
    return phase


async def check_status(response: aiohttp.ClientResponse) -> None:
    """Return for 200. Raises ``Refused`` for 429 and 503, ``WrongAnswer`` for anything else."""
    if response.status == 200:
        return
    error = await read_error(response)
    if response.status in (429, 503):
        if int(response.headers.get("Retry-After", "0")) < 1:
            raise WrongAnswer(f"{response.status} without Retry-After")
        raise Refused(response.status)
    raise WrongAnswer(f"status {response.status}: {error}")


async def read_error(response: aiohttp.ClientResponse) -> dict[str, Any]:
    """Return the error in an answer. Raises ``WrongAnswer`` if it is not in OpenAI's shape."""
    try:
        error = (await response.json())["error"]
        known = set(error) == _ERROR_FIELDS and error["code"] == response.status
    except (aiohttp.ContentTypeError, json.JSONDecodeError, KeyError, TypeError):
        known = False
    if not known:
        raise WrongAnswer(f"{response.status} without an error object: {await response.text()!r}")
    found: dict[str, Any] = error
    return found


async def events(response: aiohttp.ClientResponse) -> AsyncIterator[dict[str, Any]]:
    """Yield the events before ``[DONE]``. Raises ``WrongAnswer`` if that is not the last."""
    async for line in response.content:
        data = line.decode().removeprefix("data: ").strip()
        if data == "[DONE]":
            if (await response.content.read()).strip():
                raise WrongAnswer("the stream goes on after [DONE]")
            return
        if data:
            yield json.loads(data)
    raise WrongAnswer("the stream ended without [DONE]")
