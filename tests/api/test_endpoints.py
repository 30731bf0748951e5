"""The HTTP endpoints over real sockets, as the OpenAI SDK and plain HTTP clients use them."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import aiohttp
import openai
import pytest

from serve.tokenizer.tokenizer import Tokenizer
from tests.support.fake_service import (
    ALIAS,
    FIRST_ID,
    MAX_MODEL_LEN,
    MODEL,
    FakeCluster,
    serving,
    texts,
)

HELLO: Any = [{"role": "user", "content": "Hello"}]


@pytest.fixture
async def sdk(http: aiohttp.ClientSession) -> AsyncIterator[openai.AsyncOpenAI]:
    base_url = str(http._base_url).rstrip("/") + "/v1"
    async with openai.AsyncOpenAI(api_key="x", base_url=base_url, max_retries=0) as client:
        yield client


async def post(http: aiohttp.ClientSession, path: str, body: Any) -> tuple[int, Any]:
    async with http.post(path, json=body) as response:
        return response.status, await response.json()


# --- the SDK --------------------------------------------------------------------------------------


async def test_sdk_completion(sdk: openai.AsyncOpenAI, cluster: FakeCluster) -> None:
    answer = await sdk.completions.create(model=MODEL, prompt="Hello there", max_tokens=5)
    choice = answer.choices[0]
    assert (choice.text, choice.finish_reason, choice.index) == (texts(5), "length", 0)
    num_prompt = len(cluster.seen[0].prompt_ids)
    assert answer.usage is not None
    assert answer.usage.model_dump(exclude_unset=True) == {
        "prompt_tokens": num_prompt,
        "completion_tokens": 5,
        "total_tokens": num_prompt + 5,
    }
    assert answer.id.startswith("cmpl-")
    assert answer.id == f"cmpl-{answer._request_id}"


async def test_sdk_chat(sdk: openai.AsyncOpenAI, cluster: FakeCluster) -> None:
    cluster.stop_at = 3
    answer = await sdk.chat.completions.create(model=ALIAS, messages=HELLO)
    assert answer.choices[0].message.content == texts(3)
    assert answer.choices[0].finish_reason == "stop"
    assert answer.model == ALIAS
    # Without a limit the context is the limit.
    request = cluster.seen[0]
    assert request.sampling.max_tokens == MAX_MODEL_LEN - len(request.prompt_ids)


@pytest.mark.parametrize("n", [1, 3])
async def test_sdk_streams(sdk: openai.AsyncOpenAI, n: int) -> None:
    stream = await sdk.chat.completions.create(
        model=MODEL,
        messages=HELLO,
        n=n,
        max_completion_tokens=4,
        stream=True,
        stream_options={"include_usage": True},
    )
    chunks = [chunk async for chunk in stream]
    text, roles, ends = [""] * n, [0] * n, [0] * n
    for chunk in chunks[:-1]:
        (choice,) = chunk.choices
        assert chunk.usage is None
        text[choice.index] += choice.delta.content or ""
        roles[choice.index] += choice.delta.role == "assistant"
        ends[choice.index] += choice.finish_reason == "length"
    assert text == [texts(4)] * n
    assert roles == ends == [1] * n
    assert len({(chunk.id, chunk.created) for chunk in chunks}) == 1
    assert chunks[-1].choices == []
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == 4 * n


async def test_sdk_completion_stream_of_several_prompts(
    sdk: openai.AsyncOpenAI, cluster: FakeCluster
) -> None:
    stream = await sdk.completions.create(
        model=MODEL, prompt=[[1, 2], [3]], n=2, max_tokens=3, seed=5, stream=True
    )
    text = [""] * 4
    async for chunk in stream:
        text[chunk.choices[0].index] += chunk.choices[0].text
    assert text == [texts(3)] * 4
    asked = [(tuple(request.prompt_ids), request.sampling.seed) for request in cluster.seen]
    assert asked == [((1, 2), 5), ((1, 2), 6), ((3,), 5), ((3,), 6)]


async def test_sdk_models(sdk: openai.AsyncOpenAI) -> None:
    models = await sdk.models.list()
    assert [model.id for model in models.data] == [MODEL, ALIAS]
    model = await sdk.models.retrieve(MODEL)
    assert (model.id, model.object, model.created) == (MODEL, "model", 7)
    assert model.model_extra is not None
    assert model.model_extra["max_model_len"] == MAX_MODEL_LEN
    with pytest.raises(openai.NotFoundError) as caught:
        await sdk.models.retrieve("some/other")
    assert caught.value.param == "model"


async def test_sdk_errors(sdk: openai.AsyncOpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        await sdk.completions.create(model=MODEL, prompt="x", temperature=3)
    assert caught.value.param == "temperature"
    assert caught.value.type == "BadRequestError"
    with pytest.raises(openai.NotFoundError):
        await sdk.completions.create(model="nothing", prompt="x")


# --- our own fields, and the other endpoints ------------------------------------------------------


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
async def test_token_ids_and_timeline(
    http: aiohttp.ClientSession, cluster: FakeCluster, path: str
) -> None:
    body = {"prompt": "Hello", "messages": HELLO, "max_tokens": 3}
    body |= {"return_token_ids": True, "return_timeline": True}
    _, answer = await post(http, path, body)
    choice = answer["choices"][0]
    assert choice["prompt_token_ids"] == list(cluster.seen[0].prompt_ids)
    assert choice["token_ids"] == [FIRST_ID, FIRST_ID + 1, FIRST_ID + 2]
    timeline = choice["timeline"]
    assert timeline["prefill_ended_s"] == 4.0
    assert timeline["finished_s"] >= timeline["arrived_s"]


async def test_request_ids(http: aiohttp.ClientSession) -> None:
    body = {"prompt": "Hello", "max_tokens": 1, "request_id": "mine"}
    async with http.post("/v1/completions", json=body) as response:
        assert (await response.json())["id"] == "cmpl-mine"
        assert response.headers["X-Request-Id"] == "mine"
    headers = {"X-Request-Id": "theirs"}
    async with http.post("/v1/completions", json=body, headers=headers) as response:
        assert (await response.json())["id"] == "cmpl-theirs"
    async with http.get("/nowhere", headers=headers) as response:
        assert response.headers["X-Request-Id"] == "theirs"
    async with http.get("/version", headers={"X-Request-Id": "x" * 500}) as response:
        assert len(response.headers["X-Request-Id"]) == 32


async def test_tokenize_and_back(http: aiohttp.ClientSession, tokenizer: Tokenizer) -> None:
    for text in ("Hello, wörld", "many words " * 2000):
        _, answer = await post(
            http, "/tokenize", {"model": MODEL, "prompt": text, "return_token_strs": True}
        )
        assert answer["tokens"] == tokenizer.encode(text)
        assert answer["count"] == len(answer["token_strs"]) == len(answer["tokens"])
        assert answer["max_model_len"] == MAX_MODEL_LEN
        _, back = await post(http, "/detokenize", {"tokens": answer["tokens"]})
        assert back == {"prompt": text}
    _, chat = await post(http, "/tokenize", {"messages": HELLO})
    assert chat["tokens"] == tokenizer.encode(tokenizer.render_chat(HELLO), False)


async def test_long_prompts_of_ids(http: aiohttp.ClientSession, cluster: FakeCluster) -> None:
    cluster.service.set_ready(200_000)
    ids = list(range(40_000)) * 2
    for prompt in (ids, [ids, ids[:5]]):
        status, answer = await post(http, "/v1/completions", {"prompt": prompt, "max_tokens": 1})
        assert status == 200, answer
    assert [len(r.prompt_ids) for r in cluster.seen] == [80_000, 80_000, 5]
    assert cluster.seen[0].prompt_ids.tolist() == ids


async def test_system_endpoints(http: aiohttp.ClientSession) -> None:
    for path in ("/health", "/ping", "/version", "/metrics", "/cluster", "/v1/models"):
        async with http.get(path) as response:
            assert response.status == 200, path
        async with http.head(path) as response:
            assert response.status == 200, path
    async with http.get("/cluster") as response:
        replicas = (await response.json())["replicas"]
    assert [replica["role"] for replica in replicas] == ["prefill", "decode"]
    assert set(replicas[0]) == {
        *("id", "role", "ranks", "tp", "pp", "num_blocks", "num_free_blocks", "num_waiting"),
        *("num_running", "num_receiving", "num_sending"),
    }


async def test_without_tokenizer() -> None:
    cluster = FakeCluster(None)
    async with serving(cluster.app) as url, aiohttp.ClientSession(url) as http:
        status, answer = await post(http, "/v1/completions", {"prompt": [1, 2], "max_tokens": 2})
        assert status == 200
        for path, body in [
            ("/v1/completions", {"prompt": "text"}),
            ("/v1/completions", {"prompt": [1], "stop": "x"}),
            ("/v1/chat/completions", {"messages": HELLO}),
            ("/tokenize", {"prompt": "text"}),
            ("/detokenize", {"tokens": [1]}),
        ]:
            status, answer = await post(http, path, body)
            assert status == 400, (path, body)
            assert "tokenizer" in answer["error"]["message"]
