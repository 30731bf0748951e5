"""Random bodies: each is answered with 2xx or 4xx, in time, and leaves no state behind.

The examples are the same in every run.
"""

from __future__ import annotations

import asyncio
import http.client
import json
import threading
from collections.abc import Iterator
from concurrent.futures import Future
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.support.fake_service import MODEL, FakeCluster, load_test_tokenizer, serving

PATHS = ("/v1/completions", "/v1/chat/completions", "/tokenize", "/detokenize")
STUCK_S = 20.0

examples = settings(
    max_examples=300,
    derandomize=True,
    deadline=None,
    database=None,
    suppress_health_check=[HealthCheck.too_slow],
)

scalars = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 5),
    st.sampled_from([2**31, 2**53, 2**63, -(2**63), 10**40, 1e300, -0.0, 0.5, 1.0, 2.0]),
    st.text(max_size=8),
    st.sampled_from(
        ["", "none", "auto", "text", "user", "\u0000", "é", "\U0001f600", "<|im_end|>"]
    ),
)
values = st.recursive(
    scalars,
    lambda inner: st.one_of(
        st.lists(inner, max_size=4),
        st.dictionaries(st.one_of(st.text(max_size=5), st.just("type")), inner, max_size=3),
    ),
    max_leaves=8,
)

token_ids = st.lists(st.integers(-1, 49153), max_size=5)
parts = st.lists(st.fixed_dictionaries({"type": st.just("text"), "text": st.text(max_size=9)}))
message = st.fixed_dictionaries(
    {"role": st.sampled_from(["user", "system", "assistant", "developer", "tool", ""])},
    optional={"content": st.one_of(st.text(max_size=20), parts, values), "tool_calls": values},
)

LIKELY: dict[str, st.SearchStrategy[Any]] = {
    "model": st.sampled_from([MODEL, "", "alias", "other"]),
    "prompt": st.one_of(
        st.text(max_size=20), token_ids, st.lists(token_ids, max_size=3),
        st.lists(st.text(max_size=9), max_size=3),
    ),
    "messages": st.lists(message, max_size=3),
    "tokens": token_ids,
    "max_tokens": st.integers(-1, 8),
    "max_completion_tokens": st.integers(0, 8),
    "min_tokens": st.integers(-1, 4),
    "n": st.integers(0, 4),
    "temperature": st.floats(-1, 3),
    "top_p": st.floats(0, 1.5),
    "top_k": st.integers(-2, 60_000),
    "min_p": st.floats(0, 1),
    "seed": st.integers(-(2**64), 2**64),
    "presence_penalty": st.floats(-3, 3),
    "frequency_penalty": st.floats(-3, 3),
    "repetition_penalty": st.floats(-1, 3),
    "stop": st.one_of(st.text(max_size=3), st.lists(st.text(max_size=3), max_size=3)),
    "stop_token_ids": token_ids,
    "logit_bias": st.dictionaries(st.integers(-1, 50_000).map(str), st.floats(-101, 101)),
    "stream": st.booleans(),
    "stream_options": st.fixed_dictionaries(
        {}, optional={"include_usage": st.booleans(), "continuous_usage_stats": st.booleans()}
    ),
    "return_token_ids": st.booleans(),
    "return_timeline": st.booleans(),
    "ignore_eos": st.booleans(),
    "skip_special_tokens": st.booleans(),
    "include_stop_str_in_output": st.booleans(),
    "add_special_tokens": st.booleans(),
    "add_generation_prompt": st.booleans(),
    "chat_template_kwargs": st.dictionaries(
        st.sampled_from(
            ["tools", "documents", "return_dict", "tokenizer_kwargs", "self", "padding", "x",
             "continue_final_message", "return_assistant_tokens_mask", "messages", "kwargs",
             "return_tensors", "add_generation_prompt", "conversation", "chat_template"]
        ),
        values, max_size=2,
    ),
    "logprobs": st.sampled_from([0, 1, True, False]),
    "echo": st.booleans(),
    "tools": st.lists(values, max_size=1),
    "response_format": st.fixed_dictionaries({"type": st.sampled_from(["text", "json_object"])}),
    "best_of": st.integers(-1, 3),
    "request_id": st.text(max_size=5),
}  # fmt: skip

# Three in four values are of the right type, so that many bodies are accepted.
fields = {name: st.one_of(good, good, good, values) for name, good in LIKELY.items()}
needed = {name: fields.pop(name) for name in ("prompt", "messages", "tokens")}
bodies = st.lists(st.sampled_from(sorted(fields)), max_size=5, unique=True).flatmap(
    lambda names: st.fixed_dictionaries(needed, optional={name: fields[name] for name in names})
)


class Server:
    """A fake cluster on an event loop of its own. Each request has its own connection."""

    def __init__(self) -> None:
        self.loop = asyncio.new_event_loop()
        self.address: Future[tuple[FakeCluster, str]] = Future()
        self.stopped: asyncio.Event
        self.thread = threading.Thread(target=self.loop.run_until_complete, args=(self._run(),))
        self.thread.start()
        self.cluster, url = self.address.result(STUCK_S)
        self.host = url.removeprefix("http://")

    async def _run(self) -> None:
        self.stopped = asyncio.Event()
        cluster = FakeCluster(load_test_tokenizer())
        async with serving(cluster.app) as url:
            self.address.set_result((cluster, url))
            await self.stopped.wait()

    def close(self) -> None:
        self.loop.call_soon_threadsafe(self.stopped.set)
        self.thread.join()

    def post(self, path: str, body: bytes) -> tuple[int, bytes]:
        connection = http.client.HTTPConnection(self.host, timeout=STUCK_S)
        try:
            connection.request("POST", path, body)
            response = connection.getresponse()
            return response.status, response.read()
        finally:
            connection.close()

    def check_at_rest(self) -> None:
        async def check() -> None:
            self.cluster.assert_at_rest()

        asyncio.run_coroutine_threadsafe(check(), self.loop).result(STUCK_S)


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    server = Server()
    yield server
    server.close()


def check(server: Server, path: str, body: bytes) -> int:
    status, answer = server.post(path, body)
    assert 200 <= status < 300 or 400 <= status < 500, (path, body, answer)
    if status >= 400:
        error = json.loads(answer)["error"]
        assert set(error) == {"message", "type", "param", "code"}, answer
        assert error["code"] == status
    else:
        assert b'"error"' not in answer, (path, body, answer)
    server.check_at_rest()
    return status


@examples
@given(path=st.sampled_from(PATHS), body=bodies)
def test_bodies_that_look_right(server: Server, path: str, body: dict[str, Any]) -> None:
    check(server, path, json.dumps(body).encode())


@examples
@given(path=st.sampled_from(PATHS), name=st.sampled_from(sorted(LIKELY)), value=values)
def test_one_field_with_anything(server: Server, path: str, name: str, value: Any) -> None:
    sound = {
        "prompt": "Hello",
        "messages": [{"role": "user", "content": "Hello"}],
        "tokens": [5],
        "max_tokens": 3,
    }
    check(server, path, json.dumps({**sound, name: value}).encode())
    assert check(server, path, json.dumps(sound).encode()) == 200


@examples
@given(path=st.sampled_from(PATHS), body=st.one_of(st.binary(max_size=200), values.map(json.dumps)))
def test_anything_at_all(server: Server, path: str, body: bytes | str) -> None:
    check(server, path, body if isinstance(body, bytes) else body.encode())


@examples
@given(
    path=st.sampled_from(PATHS), body=bodies, cut=st.integers(0, 10**6), byte=st.binary(max_size=3)
)
def test_broken_bodies(
    server: Server, path: str, body: dict[str, Any], cut: int, byte: bytes
) -> None:
    data = json.dumps(body).encode()
    cut %= len(data)
    check(server, path, data[:cut] + byte + data[cut + 1 :])
