"""The load generator's client parses the bytes of servers: tokens, errors, split chunks."""

from __future__ import annotations

import json
import random
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any

import pytest
from aiohttp import web

from bench.load.client import Client, RequestFailed, Target, find_model
from bench.load.record import Record

Send = Callable[[web.StreamResponse], Any]


class ScriptedServer:
    """Answers every request with the same bytes, written piece by piece; keeps the bodies."""

    def __init__(self, pieces: Sequence[bytes], status: int = 200, cut: bool = False) -> None:
        self.pieces, self.status, self.cut = pieces, status, cut
        self.bodies: list[dict[str, Any]] = []
        self.paths: list[str] = []
        self.url = ""

    async def answer(self, http: web.Request) -> web.StreamResponse:
        self.bodies.append(await http.json() if http.can_read_body else {})
        self.paths.append(http.path)
        response = web.StreamResponse(status=self.status)
        await response.prepare(http)
        for piece in self.pieces:
            await response.write(piece)
        if self.cut:
            assert http.transport is not None
            http.transport.abort()
        await response.write_eof()
        return response


@asynccontextmanager
async def listening(server: ScriptedServer) -> AsyncIterator[ScriptedServer]:
    """Run ``server`` on a free port."""
    app = web.Application()
    app.router.add_route("*", "/{path:.*}", server.answer)
    runner = web.AppRunner(app)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    server.url = f"http://127.0.0.1:{runner.addresses[0][1]}"
    yield server
    await runner.cleanup()


def event(**fields: Any) -> bytes:
    """Encode one server-sent event."""
    return b"data: " + json.dumps(fields).encode() + b"\n\n"


def usage(completion: int, prompt: int = 7) -> dict[str, int]:
    return {"prompt_tokens": prompt, "completion_tokens": completion}


DONE = b"data: [DONE]\n\n"
COUNTED = [
    event(choices=[{"index": 0, "text": "a"}], usage=usage(1)),
    event(choices=[{"index": 0, "text": ""}], usage=usage(1)),
    event(choices=[{"index": 0, "text": "bcd"}], usage=usage(4)),
    event(
        choices=[{"index": 0, "text": "e", "timeline": {"arrived_s": 1.0, "finished_s": 3.5}}],
        usage=usage(5),
    ),
    event(choices=[], usage=usage(5)),
    DONE,
]


async def ask(server: ScriptedServer, **options: Any) -> Record:
    """Send one request to ``server`` and return its record."""
    record = Record(index=0, scheduled_s=0.0, sent_s=0.0, num_prompt_tokens=3, max_tokens=5)
    async with listening(server):
        target = Target((server.url,), "m", **options)
        async with Client(target) as client:
            return await client.send(record, target.body([1, 2, 3], 5))


async def test_tokens_are_counted_by_the_running_usage_and_not_by_chunks() -> None:
    record = await ask(ScriptedServer(COUNTED))
    assert record.error is None
    assert sum(record.token_counts) == record.num_output_tokens == 5
    assert len(record.token_times_s) == len(record.token_counts) <= 3
    assert record.counted
    assert record.num_prompt_tokens == 7  # the server knows better than the plan
    assert record.timeline == {"arrived_s": 1.0, "finished_s": 3.5}
    assert record.sent_s <= record.token_times_s[0] <= record.token_times_s[-1] <= record.end_s


async def test_any_split_of_the_bytes_gives_the_same_counts() -> None:
    whole = b": keep-alive\r\n\r\n" + b"".join(COUNTED).replace(b"\n", b"\r\n")
    seed = random.randrange(2**32)
    print("seed", seed)
    rng = random.Random(seed)
    for _ in range(10):
        ends = sorted(rng.sample(range(1, len(whole)), 9))
        pieces = [whole[a:b] for a, b in zip([0, *ends], [*ends, len(whole)], strict=True)]
        record = await ask(ScriptedServer(pieces))
        assert (record.error, record.num_output_tokens, sum(record.token_counts)) == (None, 5, 5)


async def test_tokens_are_counted_by_their_ids_if_asked() -> None:
    pieces = [
        event(choices=[{"index": 0, "text": "", "token_ids": [5, 6]}]),
        event(choices=[{"index": 0, "text": "x", "token_ids": [7]}]),
        event(choices=[], usage=usage(3)),
        DONE,
    ]
    server = ScriptedServer(pieces)
    record = await ask(server, token_ids=True)
    assert (record.error, record.num_output_tokens, sum(record.token_counts)) == (None, 3, 3)
    assert record.counted
    assert server.bodies[0]["return_token_ids"] is True
    assert "continuous_usage_stats" not in server.bodies[0]["stream_options"]


async def test_without_running_counts_the_final_usage_counts_and_the_record_says_so() -> None:
    chunks = [event(choices=[{"index": 0, "delta": {"content": word}}]) for word in "abc"]
    record = await ask(ScriptedServer([*chunks, event(choices=[], usage=usage(8)), DONE]))
    assert record.num_output_tokens == 8
    assert not record.counted


@pytest.mark.parametrize(
    ("server", "words"),
    [
        (ScriptedServer([*COUNTED[:2], event(error={"message": "rank 3 died"}), DONE]), "rank 3"),
        (ScriptedServer(COUNTED[:3]), "broke off"),
        (ScriptedServer(COUNTED[:3], cut=True), ""),
        (ScriptedServer([b'{"error": {"message": "too long", "code": 400}}'], 400), "too long"),
        (ScriptedServer([b'{"object": "error", "message": "no room"}'], 503), "503: no room"),
        (ScriptedServer([b"bad gateway"], 502), "502: bad gateway"),
        (ScriptedServer([b"data: {nonsense\n\n", DONE]), "malformed"),
        (ScriptedServer([event(choices=[], usage=usage(0)), DONE]), "no tokens"),
    ],
)
async def test_what_goes_wrong_is_in_the_record(server: ScriptedServer, words: str) -> None:
    record = await ask(server)
    assert record.error
    assert words in record.error
    assert record.end_s >= record.sent_s


async def test_a_server_that_is_not_there_is_an_error_of_the_request() -> None:
    async with listening(ScriptedServer(COUNTED)) as server:
        url = server.url
    target = Target((url,), "m")
    async with Client(target) as client:
        record = await client.send(Record(index=0, scheduled_s=0, sent_s=0), target.body([1], 1))
    assert record.error
    with pytest.raises(RequestFailed, match="does not answer"):
        await find_model(url, {})


async def test_copies_of_a_server_take_turns() -> None:
    async with listening(ScriptedServer(COUNTED)) as one, listening(ScriptedServer(COUNTED)) as two:
        target = Target((one.url, two.url), "m")
        async with Client(target) as client:
            for index in range(5):
                record = Record(index=index, scheduled_s=0, sent_s=0)
                await client.send(record, target.body([index], 1))
        assert [body["prompt"] for body in one.bodies] == [[0], [2], [4]]
        assert [body["prompt"] for body in two.bodies] == [[1], [3]]


async def test_the_body_asks_for_what_was_planned() -> None:
    server = ScriptedServer(COUNTED)
    await ask(server, extra_body={"ignore_eos": None, "top_k": 3})
    body = server.bodies[0]
    assert server.paths == ["/v1/completions"]
    assert (body["prompt"], body["max_tokens"], body["model"]) == ([1, 2, 3], 5, "m")
    assert body["stream"] is True
    assert body["top_k"] == 3
    assert "ignore_eos" not in body


async def test_the_model_is_the_first_that_the_server_lists() -> None:
    listing = json.dumps({"data": [{"id": "org/name"}, {"id": "other"}]}).encode()
    async with listening(ScriptedServer([listing])) as server:
        assert await find_model(server.url, {}) == "org/name"
    async with listening(ScriptedServer([b"{}"])) as server:
        with pytest.raises(RequestFailed, match="names no model"):
            await find_model(server.url, {})
