"""Connections: bad HTTP, deadlines, caps, clients that close one side or stop reading."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import socket
from collections.abc import AsyncIterator
from typing import Any

import pytest

from serve.api import body, refusals
from serve.api.refusals import ENCODINGS
from serve.config.http import HttpLimits
from serve.protocol.messages import Delta
from serve.tokenizer.tokenizer import Tokenizer
from tests.support.fake_service import FakeCluster, serving

COMPLETIONS = "/v1/completions"
SOON_S = 0.05  # deadlines of the tests that wait for one


@contextlib.asynccontextmanager
async def served(
    tokenizer: Tokenizer | None = None, **limits: Any
) -> AsyncIterator[tuple[FakeCluster, int]]:
    cluster = FakeCluster(tokenizer, limits=HttpLimits(**limits))
    async with serving(cluster.app) as url:
        yield cluster, int(url.rsplit(":", 1)[1])
    cluster.assert_at_rest()


async def send(port: int, data: bytes) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(data)
    return reader, writer


async def exchange(port: int, data: bytes) -> tuple[int, dict[str, str], bytes]:
    """Send ``data``, read until the server closes; return status, headers and body."""
    reader, writer = await send(port, data)
    received = await reader.read()
    writer.close()
    return split(received)


def split(received: bytes) -> tuple[int, dict[str, str], bytes]:
    head, _, body = received.partition(b"\r\n\r\n")
    status, *lines = head.decode().split("\r\n")
    assert status.startswith("HTTP/1.1 "), received
    pairs = (line.split(": ", 1) for line in lines)
    headers = {name.lower(): value for name, value in pairs}
    return int(status.split()[1]), headers, body


def post(body: dict[str, Any], *headers: str, version: str = "1.1") -> bytes:
    data = json.dumps(body).encode()
    lines = [f"POST {COMPLETIONS} HTTP/{version}", "Host: x", f"Content-Length: {len(data)}"]
    return "\r\n".join([*lines, *headers, "", ""]).encode() + data


def check_error(status: int, headers: dict[str, str], body: bytes) -> str:
    """Check the shape of an error answer that ends its connection, and return its message."""
    assert headers["content-type"].startswith("application/json")
    assert headers["x-request-id"]
    assert headers["connection"] == "close"
    error = json.loads(body)["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["code"] == status
    return str(error["message"])


HEAD = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\n"

BAD_HTTP: dict[str, tuple[bytes, int, str]] = {
    "http/2": (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 505, "HTTP/2 is not supported"),
    "http/3": (b"GET / HTTP/3.0\r\nHost: x\r\n\r\n", 505, "version of HTTP"),
    "both lengths": (
        HEAD + b"Content-Length: 2\r\nTransfer-Encoding: chunked\r\n\r\n2\r\n{}\r\n0\r\n\r\n",
        400,
        "Transfer-Encoding can't be present with Content-Length",
    ),
    "long header": (HEAD + b"X-A: " + b"a" * 9000 + b"\r\n\r\n", 431, "--max-header-bytes"),
    "long path": (b"GET /" + b"a" * 9000 + b" HTTP/1.1\r\nHost: x\r\n\r\n", 431, "8190 bytes"),
    "many headers": (HEAD + b"X-A: 1\r\n" * 200 + b"\r\n", 431, "more than 128 headers"),
    "large headers": (
        HEAD + b"".join(b"X-%d: " % i + b"a" * 1000 + b"\r\n" for i in range(100)) + b"\r\n",
        431,
        "the headers exceed 65520 bytes (8 times --max-header-bytes)",
    ),
    "expectation": (HEAD + b"Connection: close\r\nExpect: 200-ok\r\n\r\n", 417, "Expect 200-ok"),
    "tls": (b"\x16\x03\x01\x02\x00\x01", 400, "HTTPS"),
    "no host": (b"GET /ping HTTP/1.1\r\n\r\n", 400, "Host"),
    "chunk size": (
        HEAD + b"Transfer-Encoding: chunked\r\n\r\nZZ\r\nabc\r\n",
        400,
        "not valid HTTP",
    ),
    "encoding": (HEAD + b"Content-Encoding: compress\r\nContent-Length: 2\r\n\r\n{}", 415, "gzip"),
}


@pytest.mark.parametrize("name", BAD_HTTP)
async def test_bad_http_is_answered_in_json(name: str, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "serve")
    data, wanted, part = BAD_HTTP[name]
    async with served() as (_, port):
        status, headers, body = await exchange(port, data)
    assert status == wanted
    assert part in check_error(status, headers, body)
    if status == 415:
        assert headers["accept-encoding"] == ", ".join(ENCODINGS)
    records = [record for record in caplog.records if record.levelno >= logging.INFO]
    assert len(records) <= 1
    assert all(r.levelno < logging.ERROR and "\n" not in r.getMessage() for r in records)


@pytest.mark.parametrize("encoding", ["br", "zstd"])
async def test_encodings_need_their_library(encoding: str, monkeypatch: pytest.MonkeyPatch) -> None:
    always = ENCODINGS[:2]
    monkeypatch.setattr(body, "ENCODINGS", always)
    monkeypatch.setattr(refusals, "ENCODINGS", always)
    data = HEAD + f"Content-Encoding: {encoding}\r\nContent-Length: 4\r\n\r\nabcd".encode()
    async with served() as (_, port):
        status, headers, answer = await exchange(port, data)
    assert (status, headers["accept-encoding"]) == (415, "gzip, deflate")
    assert encoding in check_error(status, headers, answer)


@pytest.mark.parametrize("num_bytes", [100, 2000])
async def test_a_body_is_asked_for_unless_it_is_refused(num_bytes: int) -> None:
    head = HEAD + b"Expect: 100-continue\r\nConnection: close\r\n"
    async with served(max_body_bytes=1000) as (_, port):
        reader, writer = await send(port, head + b"Content-Length: %d\r\n\r\n" % num_bytes)
        first = await reader.readuntil(b"\r\n\r\n")
        if num_bytes > 1000:
            assert first.startswith(b"HTTP/1.1 413 ")
        else:
            assert first == b"HTTP/1.1 100 Continue\r\n\r\n"
            writer.write(b'{"prompt": [1, 2], "max_tokens": 1}'.ljust(num_bytes))
            status, _, body = split(await reader.read())
            assert (status, json.loads(body)["usage"]["prompt_tokens"]) == (200, 2)
        writer.close()


# --- deadlines ----------------------------------------------------------------------------------


async def test_headers_that_do_not_come() -> None:
    async with served(header_timeout_s=SOON_S) as (cluster, port):
        half = [await send(port, HEAD + b"X-A: ") for _ in range(200)]
        status, headers, body = await exchange(port, HEAD)
        assert status == 408
        assert "--header-timeout-s" in check_error(status, headers, body)
        for reader, writer in half:
            assert split(await reader.read())[0] == 408
            writer.close()
        assert not cluster.seen


async def test_headers_without_end() -> None:
    async with served(max_header_bytes=256) as (_, port):
        reader, writer = await send(port, HEAD)
        writer.write(b"X-A: 1\r\n" * 100)
        await asyncio.sleep(0.01)
        writer.write(b"X-A: 1\r\n" * 180)
        assert split(await reader.read())[0] == 431
        writer.close()


async def test_a_body_that_does_not_come(caplog: pytest.LogCaptureFixture) -> None:
    async with served(body_timeout_s=SOON_S) as (cluster, port):
        for start in (b"Content-Length: 1000\r\n\r\n{", b"Transfer-Encoding: chunked\r\n\r\n"):
            status, headers, body = await exchange(port, HEAD + start)
            assert status == 408
            assert "--body-timeout-s" in check_error(status, headers, body)
        assert not cluster.seen
    assert not [record for record in caplog.records if record.levelno >= logging.ERROR]


async def test_an_idle_connection_is_closed() -> None:
    async with served(keep_alive_timeout_s=SOON_S) as (_, port):
        reader, writer = await send(port, b"GET /ping HTTP/1.1\r\nHost: x\r\n\r\n")
        assert (await reader.read()).startswith(b"HTTP/1.1 200 ")
        writer.close()


async def test_a_client_that_stops_reading_is_dropped() -> None:
    async with served(write_timeout_s=SOON_S) as (cluster, port):
        cluster.hold_at = 0
        with socket.socket() as raw:
            raw.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            raw.connect(("127.0.0.1", port))
            raw.sendall(post({"prompt": [1], "max_tokens": 4000, "stream": True}))
            await cluster.until(lambda: bool(cluster.active))
            (request_id,) = cluster.active
            index = 0
            while not cluster.aborted:  # until the buffers of both sides are full
                if index < 400:
                    text = "x" * 50_000
                    delta = Delta(
                        request_id=request_id, first_index=index, token_ids=(1,), text=text
                    )
                    cluster.report(0, delta)
                    index += 1
                await asyncio.sleep(0.001)
        assert cluster.aborted == [request_id]


# --- caps ---------------------------------------------------------------------------------------


async def test_connections_of_one_address_are_capped() -> None:
    async with served(max_connections_per_address=2) as (_, port):
        first = await send(port, HEAD)
        second = await send(port, HEAD)
        await asyncio.sleep(0.01)
        status, headers, body = await exchange(port, b"")
        assert (status, headers["retry-after"]) == (429, "1")
        assert "--max-connections-per-address" in check_error(status, headers, body)
        for _, writer in (first, second):
            writer.close()
            await writer.wait_closed()
        await asyncio.sleep(0.01)
        assert (await exchange(port, post({}, "Connection: close")))[0] == 400


async def test_all_connections_are_capped() -> None:
    async with served(max_connections=1) as (_, port):
        _, writer = await send(port, HEAD)
        await asyncio.sleep(0.01)
        status, headers, body = await exchange(port, b"")
        assert status == 503
        assert "(--max-connections)" in check_error(status, headers, body)
        writer.close()


# --- clients that close their side --------------------------------------------------------------


@pytest.mark.parametrize("stream", [False, True])
async def test_a_client_that_has_sent_all_is_answered(stream: bool) -> None:
    async with served() as (cluster, port):
        cluster.hold_at = 1
        body = {"prompt": [1, 2], "max_tokens": 3, "stream": stream}
        reader, writer = await send(port, post(body))
        writer.write_eof()
        await cluster.until(lambda: [p.num_tokens for p in cluster.active.values()] == [1])
        await asyncio.sleep(0.05)  # for some probes
        assert not cluster.aborted
        cluster.release()
        received = await reader.read()
        writer.close()
    while received.startswith(b"HTTP/1.1 100 "):
        received = received.partition(b"\r\n\r\n")[2]
    status, _, data = split(received)
    assert status == 200
    if stream:
        chunks = data.split(b"\r\n")[1::2]
        assert b"".join(chunks).endswith(b"data: [DONE]\n\n")
    else:
        assert json.loads(data)["choices"][0]["text"] == " t0 t1 t2"


async def test_half_a_request_is_no_request() -> None:
    async with served() as (cluster, port):
        for data in (HEAD, HEAD + b"Content-Length: 1000\r\n\r\n{"):
            reader, writer = await send(port, data)
            writer.write_eof()
            assert await reader.read() == b""
            writer.close()
        assert not cluster.seen


async def test_an_old_client_that_closes_its_side_is_gone() -> None:
    async with served() as (cluster, port):
        cluster.hold_at = 0
        _, writer = await send(port, post({"prompt": [1]}, version="1.0"))
        await cluster.until(lambda: bool(cluster.active))
        writer.write_eof()
        await cluster.until(lambda: len(cluster.aborted) == 1)
        writer.close()


# --- browsers and keys --------------------------------------------------------------------------

PREFLIGHT = (
    b"OPTIONS /v1/completions HTTP/1.1\r\nHost: x\r\nOrigin: https://a.example\r\n"
    b"Access-Control-Request-Method: POST\r\n"
    b"Access-Control-Request-Headers: authorization,content-type\r\nConnection: close\r\n\r\n"
)


@pytest.mark.parametrize(
    ("allowed", "answered"),
    [
        (("https://a.example",), "https://a.example"),
        (("*",), "*"),
        (("https://b.example",), None),
        ((), None),
    ],
)
async def test_preflights(allowed: tuple[str, ...], answered: str | None) -> None:
    cluster = FakeCluster(None, api_key="key", limits=HttpLimits(allowed_origins=allowed))
    async with serving(cluster.app) as url:
        port = int(url.rsplit(":", 1)[1])
        status, headers, body = await exchange(port, PREFLIGHT)
        assert (status, body, headers["allow"]) == (204, b"", "OPTIONS, POST")
        assert headers.get("access-control-allow-origin") == answered
        if answered:
            assert headers["access-control-allow-methods"] == "OPTIONS, POST"
            assert headers["access-control-allow-headers"] == "authorization,content-type"
        origin = "Origin: https://a.example"
        status, headers, _ = await exchange(port, post({}, origin, "Connection: close"))
        assert status == 401  # the page must be able to read errors, too
        assert headers.get("access-control-allow-origin") == answered
        assert ("Origin" in headers.get("vary", "")) == bool(allowed)
        assert headers["www-authenticate"] == 'Bearer realm="serve"'
        key = "Authorization: Bearer  key"
        status, _, _ = await exchange(port, post({}, key, "Connection: close"))
        assert status == 400  # of the body: the key is right
        wrong = "Authorization: Bearer no"
        status, headers, _ = await exchange(port, post({}, wrong, "Connection: close"))
        assert (status, 'error="invalid_token"' in headers["www-authenticate"]) == (401, True)
