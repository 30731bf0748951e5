"""Error answers: wrong requests, a missing key, overload, a server that starts or drains."""

from __future__ import annotations

import gzip
from collections.abc import Callable
from typing import Any

import aiohttp
import brotli
import openai
import pytest
from aiohttp import web
from backports import zstd

from serve.tokenizer.tokenizer import Tokenizer
from tests.support.fake_service import MAX_MODEL_LEN, VOCAB_SIZE, FakeCluster, serving

HELLO = [{"role": "user", "content": "Hello"}]
COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"


async def check_error(response: aiohttp.ClientResponse, status: int) -> dict[str, Any]:
    """Check status and shape of an error answer, and return its error object."""
    assert response.status == status, await response.text()
    assert response.content_type == "application/json"
    assert response.headers["X-Request-Id"]
    error = (await response.json())["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["code"] == status
    assert isinstance(error["message"], str)
    assert error["message"]
    return dict(error)


BAD_FIELDS: list[tuple[str, Any]] = [
    ("temperature", -0.1), ("temperature", 2.1), ("temperature", "hot"), ("temperature", True),
    ("top_p", 0), ("top_p", 1.1), ("min_p", -1), ("top_k", -2), ("top_k", 1.5),
    ("presence_penalty", 2.5), ("frequency_penalty", -2.5), ("repetition_penalty", 0),
    ("n", 0), ("n", 129), ("n", "2"), ("n", 10**30), ("max_tokens", 0), ("max_tokens", -5),
    ("max_completion_tokens", 1.5), ("min_tokens", -1), ("min_tokens", 17), ("seed", 2**63),
    ("seed", "x"), ("stop", ""), ("stop", ["a", ""]), ("stop", [1]), ("stop", ["a"] * 65),
    ("stop", "a" * 2000), ("stop", {}), ("stop_token_ids", [VOCAB_SIZE]), ("stop_token_ids", [-1]),
    ("stop_token_ids", 5), ("stop_token_ids", [1] * 2000), ("logit_bias", {"a": 1}),
    ("logit_bias", {"-1": 1}), ("logit_bias", {str(VOCAB_SIZE): 1}), ("logit_bias", {"1": 101}),
    ("logit_bias", {"1": None}), ("logit_bias", [1]), ("ignore_eos", 1), ("stream", "yes"),
    ("logit_bias", {str(i): 1 for i in range(2000)}), ("stream_options", {"include_usage": True}),
    ("return_token_ids", 1), ("return_timeline", "x"), ("skip_special_tokens", []),
    ("add_special_tokens", 1), ("model", 5),
]  # fmt: skip

UNSUPPORTED: list[tuple[str, Any]] = [
    ("echo", True), ("logprobs", 0), ("logprobs", True), ("top_logprobs", 2), ("suffix", "x"),
    ("tools", [{"type": "function"}]), ("tool_choice", "required"), ("best_of", 3),
    ("response_format", {"type": "json_object"}), ("response_format", "text"),
    ("prompt_logprobs", 0), ("use_beam_search", True), ("guided_json", {}), ("regex", "a+"),
    ("structured_outputs", {"regex": "a"}), ("truncate_prompt_tokens", 5), ("bad_words", ["x"]),
    ("allowed_token_ids", [1]), ("kv_transfer_params", {}), ("prompt_embeds", "AAAA"),
    ("functions", [{}]), ("function_call", {"name": "f"}), ("audio", {"voice": "v"}),
    ("spaces_between_special_tokens", False), ("return_tokens_as_token_ids", True),
]  # fmt: skip


@pytest.mark.parametrize(("name", "value"), BAD_FIELDS + UNSUPPORTED)
async def test_bad_field_is_named(http: aiohttp.ClientSession, name: str, value: Any) -> None:
    for path in (COMPLETIONS, CHAT):
        if (path, name, value) == (CHAT, "min_tokens", 17):
            continue  # a chat has no small default of max_tokens
        body = {"prompt": "Hello", "messages": HELLO, name: value}
        async with http.post(path, json=body) as response:
            error = await check_error(response, 400)
            assert error["param"] == name
            assert error["type"] == "BadRequestError"


@pytest.mark.parametrize(
    "prompt",
    [
        *(None, "", [], [[]], [[1], []], 5, {}, True, [1, "a"], ["a", [1]], [1.5], [True]),
        *([[True]], [["a"]], [-1], [VOCAB_SIZE], [[1], [10**20]], [None], "a " * MAX_MODEL_LEN),
        *([1] * MAX_MODEL_LEN, ["a"] * 513, [1] * 5000 + ["a"], [[1] * 9000 + [2**70]]),
    ],
    ids=lambda value: repr(value)[:20],
)
async def test_bad_prompts(http: aiohttp.ClientSession, prompt: Any) -> None:
    async with http.post(COMPLETIONS, json={"prompt": prompt}) as response:
        error = await check_error(response, 400)
        assert error["param"] == "prompt"


@pytest.mark.parametrize(
    "messages",
    [
        *(None, [], "x", {}, [1], [{}], [{"role": 1}], [{"role": "user", "content": 5}]),
        [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}],
        [{"role": "user", "content": [{"type": "text"}]}],
        [{"role": "assistant", "tool_calls": [{"id": "x"}]}],
        [{"role": "user", "content": "word " * MAX_MODEL_LEN}],
    ],
    ids=lambda value: repr(value)[:40],
)
async def test_bad_messages(http: aiohttp.ClientSession, messages: Any) -> None:
    async with http.post(CHAT, json={"messages": messages}) as response:
        error = await check_error(response, 400)
        assert error["param"] == "messages"


@pytest.mark.parametrize(
    "data",
    [
        *(b"", b"{", b"[]", b"null", b'"x"', b"1", b"\xff\xfe", b'{"a": NaN}', b'{"a": "\\ud800"}'),
        *(b"[" * 100_000, b'{"prompt": ' + b"[" * 100_000, b'{"n": 1e999}', b"x" * 10_000),
        b'{"prompt": [1, 2' + b", 3" * 50_000,
        b'{"seed": ' + b"9" * 10_000 + b"}",
    ],
    ids=lambda value: repr(value)[:20],
)
async def test_malformed_json(http: aiohttp.ClientSession, data: bytes) -> None:
    for path in (COMPLETIONS, CHAT, "/tokenize", "/detokenize"):
        async with http.post(path, data=data) as response:
            await check_error(response, 400)


async def test_the_bodys_request_id_names_a_refusal(http: aiohttp.ClientSession) -> None:
    long = {"x": "y" * 200_000}
    for wrong in (
        {"temperature": 9},
        {"logprobs": 3},
        {"model": "other"},
        {"temperature": 9} | long,
    ):
        body = {"prompt": "Hello", "messages": HELLO, "request_id": "mine"} | wrong
        for path in (COMPLETIONS, CHAT):
            async with http.post(path, json=body) as response:
                await check_error(response, 404 if "model" in wrong else 400)
                assert response.headers["X-Request-Id"] == "mine"
            async with http.post(path, json=body, headers={"X-Request-Id": "header"}) as response:
                assert response.headers["X-Request-Id"] == "header"


COMPRESS: dict[str, Callable[[bytes], bytes]] = {
    "gzip": gzip.compress,
    "br": lambda data: brotli.compress(data, quality=1),
    "zstd": zstd.compress,
}


@pytest.mark.parametrize("encoding", COMPRESS)
async def test_compressed_bodies(http: aiohttp.ClientSession, encoding: str) -> None:
    headers, compress = {"Content-Encoding": encoding}, COMPRESS[encoding]
    body = compress(b'{"prompt": "Hello", "max_tokens": 2}')
    async with http.post(COMPLETIONS, data=body, headers=headers) as response:
        assert response.status == 200
    async with http.post(COMPLETIONS, data=b"not compressed at all", headers=headers) as response:
        await check_error(response, 400)
    bomb = compress(b" " * (64 << 20))
    async with http.post(COMPLETIONS, data=bomb, headers=headers) as response:
        await check_error(response, 413)


async def test_unknown_model_and_paths(http: aiohttp.ClientSession) -> None:
    body = {"model": "other", "prompt": "Hello", "messages": HELLO, "tokens": [1]}
    for path in (COMPLETIONS, CHAT, "/tokenize", "/detokenize"):
        async with http.post(path, json=body) as response:
            error = await check_error(response, 404)
            assert (error["type"], error["param"]) == ("NotFoundError", "model")
    for path in ("/", "/v1/embeddings", "/v1/models/a/b", "/v1/models/%ff%00"):
        async with http.get(path) as response:
            await check_error(response, 404)
    async with http.get(COMPLETIONS) as response:
        await check_error(response, 405)
        assert response.headers["Allow"] == "POST"


async def test_too_large_a_body(http: aiohttp.ClientSession) -> None:
    async with http.post(COMPLETIONS, json={"prompt": "a" * (2 << 20)}) as response:
        await check_error(response, 413)
    async with http.post(COMPLETIONS, json={"prompt": "a", "max_tokens": 1}) as response:
        assert response.status == 200


async def test_prompts_times_n_are_bounded(http: aiohttp.ClientSession) -> None:
    body = {"prompt": [[1]] * 1000, "n": 128, "max_tokens": 1}
    async with http.post(COMPLETIONS, json=body) as response:
        await check_error(response, 400)


async def test_wrong_key(tokenizer: Tokenizer) -> None:
    cluster = FakeCluster(tokenizer, api_key="kéy")
    async with serving(cluster.app) as url, aiohttp.ClientSession(url) as http:
        for header in (None, "Bearer", "Bearer wrong", "Basic kéy", "kéy", "Bearer \udcff"):
            headers: dict[str, str] = {} if header is None else {"Authorization": header}
            for path in ("/v1/models", COMPLETIONS, "/tokenize", "/nowhere", "/%76%31/models"):
                async with http.request("POST", path, headers=headers) as response:
                    error = await check_error(response, 401)
                    assert error["type"] == "AuthenticationError"
        for path in ("/health", "/ping", "/version", "/metrics"):
            async with http.get(path) as response:
                assert response.status == 200
        headers = {"Authorization": "Bearer kéy"}
        async with http.get("/v1/models", headers=headers) as response:
            assert response.status == 200


async def test_key_of_the_sdk(tokenizer: Tokenizer) -> None:
    cluster = FakeCluster(tokenizer, api_key="key")
    async with serving(cluster.app) as url:
        async with openai.AsyncOpenAI(api_key="key", base_url=f"{url}/v1") as client:
            assert (await client.models.list()).data
        async with openai.AsyncOpenAI(api_key="no", base_url=f"{url}/v1") as client:
            with pytest.raises(openai.AuthenticationError):
                await client.models.list()


async def test_too_many_waiting(tokenizer: Tokenizer) -> None:
    cluster = FakeCluster(tokenizer, max_waiting=2)
    cluster.hold_at = 0
    async with serving(cluster.app) as url, aiohttp.ClientSession(url) as http:
        body = {"prompt": "Hello", "max_tokens": 2, "n": 2, "stream": True}
        async with http.post(COMPLETIONS, json=body) as waiting:
            async with http.post(COMPLETIONS, json={"prompt": "Hello"}) as refused:
                error = await check_error(refused, 429)
                assert error["type"] == "RateLimitError"
                assert int(refused.headers["Retry-After"]) >= 1
            async with http.post(COMPLETIONS, json=body | {"n": 3}) as never:
                await check_error(never, 400)  # no use in trying again
            cluster.release()
            assert (await waiting.text()).endswith("[DONE]\n\n")
    cluster.assert_at_rest()
    assert b'reason="overloaded"} 1.0' in cluster.metrics.exposition()[0]


async def test_before_ready_and_draining(tokenizer: Tokenizer) -> None:
    cluster = FakeCluster(tokenizer, ready=False)
    cluster.hold_at = 1
    async with serving(cluster.app) as url, aiohttp.ClientSession(url) as http:

        async def check_closed() -> None:
            for path, body in ((COMPLETIONS, {"prompt": "Hello"}), (CHAT, {"messages": HELLO})):
                async with http.post(path, json=body) as response:
                    error = await check_error(response, 503)
                    assert error["type"] == "ServiceUnavailableError"
                    assert int(response.headers["Retry-After"]) >= 1
            async with http.get("/health") as response:
                assert response.status == 503
            async with http.get("/ping") as response:
                assert response.status == 200

        await check_closed()
        cluster.service.set_ready(MAX_MODEL_LEN)
        body = {"prompt": "Hello", "max_tokens": 3, "stream": True}
        async with http.post(COMPLETIONS, json=body) as open_one:
            await cluster.until(lambda: cluster.service.num_active == 1)
            cluster.service.start_draining()
            await check_closed()
            cluster.release()
            assert (await open_one.text()).endswith("[DONE]\n\n")
        await cluster.service.drained()


async def test_a_failing_handler_harms_no_other(
    cluster: FakeCluster, caplog: pytest.LogCaptureFixture
) -> None:
    async def fail(http: web.Request) -> web.Response:
        raise KeyError("secret detail")

    cluster.app.router.add_get("/fail", fail)
    cluster.hold_at = 1
    async with serving(cluster.app) as url, aiohttp.ClientSession(url) as http:
        body = {"prompt": "Hello", "max_tokens": 3}
        async with http.post(COMPLETIONS, json=body | {"stream": True}) as streaming:
            async with http.get("/fail") as response:
                error = await check_error(response, 500)
                assert "secret" not in error["message"]
            assert "secret detail" in caplog.text
            cluster.release()
            assert (await streaming.text()).endswith("[DONE]\n\n")
