"""Large bodies: refused before work, decoded without what means nothing, admitted by the budget."""

from __future__ import annotations

import asyncio
import json
from dataclasses import replace
from typing import Any

import aiohttp
import pytest

from serve.api.json_fields import decode_fields
from serve.api.schemas import ChatCompletionRequest, CompletionRequest
from serve.api.settings import API
from serve.api.validation import to_struct
from serve.config.http import HttpLimits
from serve.tokenizer.tokenizer import Tokenizer
from tests.support.fake_service import FakeCluster, load_test_tokenizer, serving

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return load_test_tokenizer()


async def post(cluster: FakeCluster, path: str, **ask: Any) -> tuple[int, dict[str, Any]]:
    async with (
        serving(cluster.app) as url,
        aiohttp.ClientSession(url) as http,
        http.post(path, **ask) as response,
    ):
        return response.status, await response.json()


@pytest.mark.parametrize("path", [COMPLETIONS, CHAT])
async def test_a_text_that_cannot_fit_is_not_tokenised(
    tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch, path: str
) -> None:
    encoded: list[int] = []
    encode = Tokenizer.encode

    def count(self: Tokenizer, text: str, add_special_tokens: bool = True) -> list[int]:
        encoded.append(len(text))
        return encode(self, text, add_special_tokens)

    monkeypatch.setattr(Tokenizer, "encode", count)
    text = "word " * 40_000
    body = {"prompt": text, "messages": [{"role": "user", "content": text}]}
    cluster = FakeCluster(tokenizer)
    status, answer = await post(cluster, path, json=body)
    error = answer["error"]
    assert status == 400
    assert "maximum context length is 512 tokens" in error["message"]
    assert "at least " in error["message"]
    assert sum(encoded) == 0
    assert cluster.app[API].pool.budget.in_use == 0


async def test_unknown_fields_are_skipped(tokenizer: Tokenizer) -> None:
    body = b'{"x": [' + b",".join([b"[]"] * 300_000) + b'], "prompt": [5, 6], "max_tokens": 2}'
    cluster = FakeCluster(tokenizer)
    _, answer = await post(cluster, COMPLETIONS, data=body)
    assert answer["usage"]["completion_tokens"] == 2
    assert tuple(cluster.seen[0].prompt_ids) == (5, 6)
    assert cluster.app[API].pool.budget.in_use == 0


EMPTY = b"[" + b"[]," * 150_000 + b"[]]"


@pytest.mark.parametrize(
    ("path", "name", "value"),
    [
        (COMPLETIONS, "prompt", EMPTY),
        (COMPLETIONS, "prompt", b"[[1]," + b"1," * 150_000 + b"[1]]"),
        (COMPLETIONS, "prompt", b'["a' + b'","' * 150_000 + b'"]'),
        (COMPLETIONS, "stop", EMPTY),
        (COMPLETIONS, "logit_bias", b"{" + b'"1":1,' * 150_000 + b'"2":1}'),
        (COMPLETIONS, "tools", EMPTY),
        (COMPLETIONS, "request_id", b'{"x":' + EMPTY + b"}"),
        (CHAT, "messages", EMPTY),
        (CHAT, "chat_template_kwargs", b'{"x":' + EMPTY + b"}"),
        (CHAT, "chat_template_kwargs", b'{"x":[' + b"1.5," * 150_000 + b"2]}"),
    ],
    ids=lambda value: value if isinstance(value, str) else repr(value)[:20],
)
async def test_a_field_of_too_many_values_is_refused(
    tokenizer: Tokenizer, path: str, name: str, value: bytes
) -> None:
    body = b'{"%b": %b}' % (name.encode(), value)
    cluster = FakeCluster(tokenizer)
    status, answer = await post(cluster, path, data=body)
    assert status == 400
    assert answer["error"]["message"] == (
        f"{name} must not have more than 131072 values (--max-field-values)"
    )
    assert answer["error"]["param"] == name


@pytest.mark.parametrize(
    "value",
    [
        b"[" + b"7," * 300_000 + b"7]",
        b"[[" + b"7," * 200_000 + b"7] , [" + b"7," * 200_000 + b"7]]",
        b'"' + rb"[{,\\\"," * 40_000 + b'"',
        b'["' + rb"[{,\\\"," * 40_000 + b'", "[,[,"]',
    ],
    ids=lambda value: repr(value)[:20],
)
def test_ids_and_texts_are_no_matter_how_long(value: bytes) -> None:
    fields = decode_fields(b'{"prompt": %b}' % value, CompletionRequest, 1 << 17)
    assert fields == {"prompt": json.loads(value)}


@pytest.mark.parametrize("value", [[], 5, "x", [["a", 1]]])
async def test_template_arguments_must_be_an_object(tokenizer: Tokenizer, value: Any) -> None:
    cluster = FakeCluster(tokenizer)
    body = {"messages": [{"role": "user", "content": "a"}], "chat_template_kwargs": value}
    status, answer = await post(cluster, CHAT, json=body)
    assert status == 400
    assert answer["error"]["message"] == "chat_template_kwargs must be an object"
    assert answer["error"]["param"] == "chat_template_kwargs"


def test_large_template_arguments_are_not_copied() -> None:
    kwargs = {str(i): [i] for i in range(10_000)}
    body = to_struct({"messages": [], "chat_template_kwargs": kwargs}, ChatCompletionRequest)
    assert body.chat_template_kwargs is kwargs


async def test_a_refused_field_is_found_in_a_large_body(tokenizer: Tokenizer) -> None:
    body = {"x": "y" * 100_000, "prompt": "a", "logprobs": 3}
    cluster = FakeCluster(tokenizer)
    status, answer = await post(cluster, COMPLETIONS, json=body)
    error = answer["error"]
    assert (status, error["param"]) == (400, "logprobs")


async def test_a_body_over_the_limit_is_not_read(tokenizer: Tokenizer) -> None:
    cluster = FakeCluster(tokenizer, limits=HttpLimits(max_body_bytes=100_000))
    status, answer = await post(cluster, COMPLETIONS, data=b"x" * 100_001)
    error = answer["error"]
    assert status == 413
    assert "100000 bytes (--max-body-bytes)" in error["message"]


async def test_small_requests_do_not_wait_for_the_budget(tokenizer: Tokenizer) -> None:
    cluster = FakeCluster(tokenizer)
    budget = cluster.app[API].pool.budget
    lease = await budget.acquire(budget.num_bytes)  # all of it is in use
    async with serving(cluster.app) as url, aiohttp.ClientSession(url) as http:
        for size in (10, 60_000):
            body = {"prompt": [1], "max_tokens": 1, "x": "y" * size}
            async with http.post(COMPLETIONS, json=body) as response:
                assert response.status == 200
        for path in ("/metrics", "/health"):
            async with http.get(path) as response:
                assert response.status == 200
    lease.release()


async def test_a_clients_slow_bodies_do_not_hold_up_anothers(tokenizer: Tokenizer) -> None:
    cluster = FakeCluster(tokenizer, limits=HttpLimits(max_body_bytes_in_work=400_000))
    cluster.app[API].settings = replace(cluster.app[API].settings, api_keys=("slow", "other"))
    budget = cluster.app[API].pool.budget
    head = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer slow\r\n"
    async with serving(cluster.app) as url, aiohttp.ClientSession(url) as http:
        writers = []
        for _ in range(5):
            _, writer = await asyncio.open_connection(*url.removeprefix("http://").split(":"))
            writer.write(head + b'Content-Length: 100000\r\n\r\n{"prompt":')
            writers.append(writer)
        while budget.in_use < 200_000:  # the server reads what came in the meantime
            await (await http.get("/ping")).read()
        body = {"prompt": [1], "max_tokens": 1, "x": "y" * 190_000}
        key = {"Authorization": "Bearer other"}
        async with http.post(COMPLETIONS, json=body, headers=key) as response:
            assert response.status == 200
        assert budget.in_use == 200_000
        for writer in writers:
            writer.close()


async def test_long_lists_are_whole_in_answers(tokenizer: Tokenizer) -> None:
    text = " hello" * 9000
    cluster = FakeCluster(tokenizer)
    _, answer = await post(cluster, "/tokenize", json={"prompt": text, "return_token_strs": True})
    assert answer["tokens"] == tokenizer.encode(text)
    assert len(answer["token_strs"]) == answer["count"] == 9000


async def test_other_fields_of_messages_reach_the_template(tokenizer: Tokenizer) -> None:
    seen: list[dict[str, object]] = []
    cluster = FakeCluster(tokenizer)
    message = {
        "role": "tool", "content": [{"type": "text", "text": "4"}], "name": "sum",
        "tool_call_id": "c1", "reasoning_content": "r", "refusal": None, "tool_calls": [],
    }  # fmt: skip

    class Recording(Tokenizer):
        def render_chat(self, messages, add_generation_prompt=True, **kwargs):  # type: ignore[no-untyped-def]
            seen.extend(messages)
            return "hi"

    api = cluster.app[API]
    api.tokenizer = Recording.__new__(Recording)
    for name, value in vars(tokenizer).items():
        setattr(api.tokenizer, name, value)
    status, _ = await post(cluster, CHAT, json={"messages": [message], "max_tokens": 1})
    assert status == 200
    assert seen == [
        {
            "role": "tool", "content": "4", "name": "sum", "tool_call_id": "c1",
            "reasoning_content": "r",
        }
    ]  # fmt: skip
