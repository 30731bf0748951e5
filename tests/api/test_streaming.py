"""Streams over real sockets: usage, slow readers, errors in mid-stream, disconnects."""

from __future__ import annotations

import asyncio
import json
import random
import socket
from typing import Any

import aiohttp
import openai
import pytest

from serve.api.answers import CompletionFormat
from serve.protocol.messages import Delta
from serve.request import FinishReason
from tests.support.fake_service import FIRST_ID, MODEL, FakeCluster, texts

HELLO: Any = [{"role": "user", "content": "Hello"}]
COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"


def parse(raw: str) -> list[dict[str, Any]]:
    """Return the events of a whole stream, without its ``[DONE]``."""
    events = raw.split("\n\n")
    assert events[-2:] == ["data: [DONE]", ""]
    assert all(event.startswith("data: ") for event in events[:-1])
    return [json.loads(event[6:]) for event in events[:-2]]


async def stream(http: aiohttp.ClientSession, path: str, **body: Any) -> list[dict[str, Any]]:
    body = {"prompt": "Hello", "messages": HELLO, "max_tokens": 4, "stream": True, **body}
    async with http.post(path, json=body) as response:
        assert response.status == 200, await response.text()
        assert response.content_type == "text/event-stream"
        return parse(await response.text())


@pytest.mark.parametrize("path", [COMPLETIONS, CHAT])
async def test_running_usage(http: aiohttp.ClientSession, cluster: FakeCluster, path: str) -> None:
    chunks = await stream(
        http,
        path,
        n=2,
        return_token_ids=True,
        stream_options={"include_usage": True, "continuous_usage_stats": True},
    )
    num_prompt = len(cluster.seen[0].prompt_ids)
    counts, ids, prompts = [0, 0], [[], []], [0, 0]  # type: ignore[var-annotated]
    for chunk in chunks[:-1]:
        (choice,) = chunk["choices"]
        index = choice["index"]
        ids[index] += choice.get("token_ids", [])
        prompts[index] += choice.get("prompt_token_ids") == list(cluster.seen[0].prompt_ids)
        counts[index] = chunk["usage"]["completion_tokens"]
        assert counts[index] == len(ids[index])
        assert chunk["usage"]["prompt_tokens"] == num_prompt
    assert ids == [[FIRST_ID + i for i in range(4)]] * 2
    assert prompts == [1, 1]
    assert chunks[-1]["choices"] == []
    assert chunks[-1]["usage"] == {
        "prompt_tokens": num_prompt,
        "completion_tokens": 8,
        "total_tokens": num_prompt + 8,
    }


@pytest.mark.parametrize("options", [{}, None, {"include_usage": False}, {"x": 1}])
async def test_usage_only_where_asked(http: aiohttp.ClientSession, options: Any) -> None:
    chunks = await stream(http, COMPLETIONS, stream_options=options)
    assert all("usage" not in chunk and chunk["choices"] for chunk in chunks)
    assert [c["choices"][0]["finish_reason"] for c in chunks] == [None] * 3 + ["length"]


async def test_a_token_without_text_makes_a_chunk(
    http: aiohttp.ClientSession, cluster: FakeCluster
) -> None:
    cluster.hold_at = 0
    task = asyncio.create_task(stream(http, COMPLETIONS))
    await cluster.until(lambda: bool(cluster.active))
    (request_id,) = cluster.active
    end: dict[str, Any] = {"finish_reason": FinishReason.STOP, "stop_reason": "###"}
    for index, more in enumerate(({}, end)):
        delta = Delta(request_id=request_id, first_index=index, token_ids=(5,), text="", **more)
        cluster.report(0, delta)
    cluster.active.clear()
    choices = [chunk["choices"][0] for chunk in await task]
    assert [choice["text"] for choice in choices] in (["", ""], [""])
    assert (choices[-1]["finish_reason"], choices[-1]["stop_reason"]) == ("stop", "###")


@pytest.mark.parametrize("num_seen", [0, 2])
async def test_error_on_the_way(url: str, cluster: FakeCluster, num_seen: int) -> None:
    cluster.hold_at = num_seen
    async with openai.AsyncOpenAI(api_key="x", base_url=f"{url}/v1", max_retries=0) as client:
        answer = await client.chat.completions.create(
            model=MODEL, messages=HELLO, n=2, max_tokens=4, stream=True
        )
        await cluster.until(lambda: all(p.num_tokens == num_seen for p in cluster.active.values()))
        assert len(cluster.active) == 2
        cluster.service.fail_all("rank 3 is lost")
        cluster.active.clear()
        pieces: list[str] = []

        async def read() -> None:
            async for chunk in answer:
                pieces.append(chunk.choices[0].delta.content or "")

        with pytest.raises(openai.APIError, match="rank 3 is lost"):
            await read()
    assert sorted("".join(pieces)) == sorted(texts(num_seen) * 2)


async def test_error_event_is_followed_by_done(
    http: aiohttp.ClientSession, cluster: FakeCluster
) -> None:
    cluster.hold_at = 1
    task = asyncio.create_task(stream(http, COMPLETIONS))
    await cluster.until(lambda: any(p.num_tokens for p in cluster.active.values()))
    cluster.service.fail_all("gone")
    cluster.active.clear()
    chunks = await task
    assert chunks[-1] == {
        "error": {"message": "gone", "type": "InternalServerError", "param": None, "code": 500}
    }


async def test_error_without_stream(http: aiohttp.ClientSession, cluster: FakeCluster) -> None:
    cluster.hold_at = 1
    task = asyncio.create_task(http.post(COMPLETIONS, json={"prompt": "a", "n": 2}))
    await cluster.until(lambda: len(cluster.active) == 2)
    cluster.service.fail_all("gone")
    cluster.active.clear()
    async with await task as response:
        assert response.status == 500
        assert (await response.json())["error"]["message"] == "gone"


async def test_exception_in_a_stream_is_an_event(
    http: aiohttp.ClientSession, cluster: FakeCluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: Any) -> None:
        raise KeyError("inner detail")

    monkeypatch.setattr(CompletionFormat, "chunk", fail)
    cluster.hold_at = 2
    chunks = await stream(http, COMPLETIONS)
    assert chunks[-1]["error"]["code"] == 500
    assert "inner" not in chunks[-1]["error"]["message"]
    await cluster.until(lambda: len(cluster.aborted) == 1)


# --- disconnects --------------------------------------------------------------------------------


async def open_request(url: str, path: str, **body: Any) -> tuple[asyncio.StreamReader, Any]:
    """Open a connection and send a request on it."""
    host, port = url.removeprefix("http://").split(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    data = json.dumps({"prompt": "Hello", "messages": HELLO, **body}).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Length: {len(data)}\r\n\r\n"
    writer.write(head.encode() + data)
    return reader, writer


@pytest.mark.parametrize("path", [COMPLETIONS, CHAT])
@pytest.mark.parametrize("streams", [False, True])
@pytest.mark.parametrize("num_seen", [0, 1, 3])
async def test_disconnect_aborts_every_choice(
    url: str, cluster: FakeCluster, path: str, streams: bool, num_seen: int
) -> None:
    cluster.hold_at = num_seen
    _, writer = await open_request(url, path, n=3, stream=streams, max_tokens=9)
    await cluster.until(lambda: [p.num_tokens for p in cluster.active.values()] == [num_seen] * 3)
    writer.close()
    await cluster.until(lambda: len(cluster.aborted) == 3)
    assert sorted(cluster.aborted) == sorted(request.id for request in cluster.seen)
    cluster.assert_at_rest()


async def test_disconnect_while_the_last_token_comes(url: str, cluster: FakeCluster) -> None:
    """The request ends once and leaves no state, in either order of the two events."""
    for _ in range(20):
        cluster.hold_at = 3
        _, writer = await open_request(url, COMPLETIONS, stream=True, max_tokens=4)
        await cluster.until(lambda: any(p.num_tokens == 3 for p in cluster.active.values()))
        writer.close()
        cluster.release()
        await cluster.until(lambda: not cluster.active)
    cluster.assert_at_rest()
    ended = [
        line.rsplit(" ", 1)[1]
        for line in cluster.metrics.exposition()[0].decode().splitlines()
        if line.startswith("vllm:request_success_total")
    ]
    assert sum(map(float, ended)) == 20


async def test_disconnect_during_the_body(url: str, cluster: FakeCluster) -> None:
    host, port = url.removeprefix("http://").split(":")
    _, writer = await asyncio.open_connection(host, int(port))
    writer.write(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\n\r\n{")
    await writer.drain()
    writer.close()
    await writer.wait_closed()
    async with aiohttp.ClientSession(url) as http:
        assert len(await stream(http, COMPLETIONS)) == 4
    assert len(cluster.seen) == 1


async def test_slow_reader_gets_everything(url: str, cluster: FakeCluster) -> None:
    """The stream joins tokens while the socket is full; other requests are not delayed."""
    num_tokens, text = 400, "x" * 20_000
    cluster.hold_at = 0
    host, port = url.removeprefix("http://").split(":")
    with socket.socket() as raw:
        raw.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        raw.connect((host, int(port)))
        raw.setblocking(False)
        reader, writer = await asyncio.open_connection(sock=raw, limit=4096)
        body = {"prompt": "Hello", "max_tokens": num_tokens, "stream": True}
        usage = {"include_usage": True, "continuous_usage_stats": True}
        data = json.dumps(body | {"stream_options": usage}).encode()
        head = f"POST {COMPLETIONS} HTTP/1.1\r\nHost: x\r\nContent-Length: {len(data)}\r\n"
        writer.write(f"{head}Connection: close\r\n\r\n".encode() + data)
        await cluster.until(lambda: bool(cluster.active))
        (request_id,) = cluster.active
        async with aiohttp.ClientSession(url) as http:
            for index in range(num_tokens):
                last = FinishReason.LENGTH if index == num_tokens - 1 else None
                delta = Delta(
                    request_id=request_id, first_index=index, token_ids=(index,), text=text,
                    finish_reason=last,
                )  # fmt: skip
                cluster.report(0, delta)
                if index % 100 == 0:
                    async with http.get("/ping") as response:
                        assert response.status == 200
        cluster.active.clear()
        received = await reader.read(-1)
        writer.close()
    payload = b"".join(received.split(b"\r\n\r\n", 1)[1].split(b"\r\n")[1::2])
    chunks = parse(payload.decode())
    assert sum(len(chunk["choices"][0]["text"]) for chunk in chunks[:-1]) == num_tokens * len(text)
    assert len(chunks) < num_tokens
    assert chunks[-2]["usage"] == chunks[-1]["usage"]
    assert chunks[-1]["usage"]["completion_tokens"] == num_tokens
    assert chunks[-2]["choices"][0]["finish_reason"] == "length"


@pytest.mark.parametrize("seed", range(3))
async def test_many_clients_at_once(url: str, cluster: FakeCluster, seed: int) -> None:
    rng = random.Random(seed)
    async with aiohttp.ClientSession(url) as http:

        async def one() -> None:
            body: dict[str, Any] = {
                "prompt": "Hello",
                "n": rng.randint(1, 3),
                "max_tokens": rng.randint(1, 20),
            }
            leaves = rng.random() < 0.3
            async with http.post(COMPLETIONS, json={**body, "stream": True}) as response:
                if leaves:
                    await response.content.readany()
                    return
                chunks = parse(await response.text())
            assert len(chunks) <= body["n"] * body["max_tokens"]
            ends = [c["choices"][0]["finish_reason"] for c in chunks].count("length")
            assert ends == body["n"]

        await asyncio.gather(*(one() for _ in range(60)))
    await cluster.until(lambda: cluster.service.num_active == 0)
