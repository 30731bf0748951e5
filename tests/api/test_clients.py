"""Bodies recorded from benchmarks and libraries, and values that mean the default."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import aiohttp
import pytest

from serve.tokenizer.tokenizer import Tokenizer
from tests.support.fake_service import MODEL, FakeCluster, load_test_tokenizer, serving

HELLO = [{"role": "user", "content": "Hello"}]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return load_test_tokenizer()


@pytest.fixture
async def http(tokenizer: Tokenizer) -> AsyncIterator[aiohttp.ClientSession]:
    cluster = FakeCluster(tokenizer)
    async with serving(cluster.app) as url, aiohttp.ClientSession(url) as session:
        yield session
    cluster.assert_at_rest()


PARTS = [{"role": "user", "content": [{"type": "text", "text": "Hello"}]}]
USAGE = {"include_usage": True, "continuous_usage_stats": True}

RECORDED: dict[str, tuple[str, dict[str, Any]]] = {
    "guidellm": (
        "/v1/chat/completions",
        {
            "model": MODEL, "messages": PARTS, "stream": True, "stream_options": USAGE,
            "max_completion_tokens": 6, "ignore_eos": True, "stop": None,
        },
    ),
    "vllm bench": (
        "/v1/completions",
        {
            "model": MODEL, "prompt": "Hello", "repetition_penalty": 1.0, "max_tokens": 6,
            "logprobs": None, "stream": True, "stream_options": {"include_usage": True},
            "temperature": 0.0, "ignore_eos": True,
        },
    ),
    "sglang bench": (
        "/v1/completions",
        {
            "model": MODEL, "prompt": "Hello", "temperature": 0.0, "best_of": 1, "max_tokens": 6,
            "stream": True, "ignore_eos": True,
        },
    ),
    "lm-eval generate": (
        "/v1/completions",
        {
            "model": MODEL, "prompt": [[1, 2, 3]], "max_tokens": 6, "temperature": 0,
            "stop": ["<|endoftext|>", "\n\n"], "seed": 1234,
        },
    ),
    "langchain llm": (
        "/v1/completions",
        {
            "model": MODEL, "prompt": ["Hello"], "max_tokens": 6, "frequency_penalty": 0,
            "presence_penalty": 0, "logprobs": None, "seed": None, "n": 1, "logit_bias": None,
            "temperature": 0.7, "top_p": 1, "stream": False, "stop": None, "suffix": None,
            "echo": None, "best_of": None, "user": None, "stream_options": None,
        },
    ),
    "langchain chat": (
        "/v1/chat/completions",
        {"model": MODEL, "messages": HELLO, "max_completion_tokens": 6, "stream": False},
    ),
    "neutral": (
        "/v1/chat/completions",
        {
            "model": "", "messages": [{"role": "developer", "content": "x"}, *HELLO],
            "max_tokens": 6, "logprobs": False, "top_logprobs": 0, "tools": [],
            "tool_choice": "none", "parallel_tool_calls": True, "top_k": -1, "min_p": 0,
            "response_format": {"type": "text"}, "store": False, "service_tier": "auto",
            "metadata": {"a": "b"}, "verbosity": "low", "reasoning_effort": "low",
            "modalities": ["text"], "prediction": None, "web_search_options": {}, "user": "u",
            "safety_identifier": "s", "prompt_cache_key": "k", "no_such_field": [1, {"a": None}],
            "length_penalty": 1.0, "echo": False, "logit_bias": {}, "stop": [],
        },
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", RECORDED)
async def test_recorded_bodies(http: aiohttp.ClientSession, name: str) -> None:
    path, body = RECORDED[name]
    async with http.post(path, json=body) as response:
        assert response.status == 200, await response.text()
        raw = await response.text()
    if body.get("stream"):
        assert raw.endswith("data: [DONE]\n\n")
        assert raw.count('"finish_reason":"length"') == 1
    else:
        assert raw.count('"completion_tokens":6') == 1


async def test_every_field_may_be_null(http: aiohttp.ClientSession) -> None:
    names = [
        *("max_tokens", "max_completion_tokens", "temperature", "top_p", "top_k", "min_p", "seed"),
        *("n", "best_of", "stop", "stop_token_ids", "logit_bias", "stream", "stream_options"),
        *("presence_penalty", "frequency_penalty", "repetition_penalty", "min_tokens", "echo"),
        *("ignore_eos", "skip_special_tokens", "include_stop_str_in_output", "logprobs", "suffix"),
        *("return_token_ids", "return_timeline", "add_special_tokens", "response_format", "tools"),
        *("model", "prompt_logprobs", "add_generation_prompt", "chat_template_kwargs", "user"),
    ]
    nothing = dict.fromkeys(names)
    async with http.post("/v1/completions", json={**nothing, "prompt": "Hello"}) as response:
        assert response.status == 200, await response.text()
        usage = (await response.json())["usage"]
        assert usage["completion_tokens"] == 16  # the default of OpenAI
    async with http.post("/v1/chat/completions", json={**nothing, "messages": HELLO}) as response:
        assert response.status == 200, await response.text()
