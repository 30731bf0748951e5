"""SmolLM2 over HTTP: the OpenAI SDK as client, our own fields and endpoints."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from typing import Any

import aiohttp
import openai
import pytest
import pytest_asyncio
from openai import AsyncOpenAI, OpenAI

from tests.support.clients import Client
from tests.support.server import Server, serving

MODEL = "SmolLM2-135M-Instruct"
CONTEXT = 8192
QUESTION: Any = [{"role": "user", "content": "What is the capital of France?"}]
FULL_STOP = 30  # a token id
ONCE_UPON = "Once upon a time, there was a"


@pytest.fixture(scope="module")
def running() -> Iterator[Server]:
    with serving(num_ranks=2) as server:
        yield server


@pytest.fixture
def server(running: Server) -> Iterator[Server]:
    """Print what the server logs during a test, which pytest shows if the test fails."""
    before = len(running.log)
    yield running
    print(running.log[before:])


@pytest.fixture
def sdk(server: Server) -> Iterator[OpenAI]:
    with OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=60.0) as sdk:
        yield sdk


@pytest_asyncio.fixture
async def session() -> AsyncIterator[aiohttp.ClientSession]:
    async with aiohttp.ClientSession() as session:
        yield session


@pytest_asyncio.fixture
async def client(server: Server, session: aiohttp.ClientSession) -> Client:
    return Client(session, server.url)


# --- the OpenAI SDK -----------------------------------------------------------------------------


def test_a_completion_has_text_reason_and_usage(sdk: OpenAI) -> None:
    done = sdk.completions.create(
        model=MODEL, prompt="The capital of France is", max_tokens=8, temperature=0
    )
    assert done.object == "text_completion"
    assert done.model == MODEL
    assert "Paris" in done.choices[0].text
    assert done.choices[0].finish_reason == "length"
    assert done.usage is not None
    assert (done.usage.prompt_tokens, done.usage.completion_tokens) == (5, 8)
    assert done.usage.total_tokens == 13


def test_a_chat_answer_ends_with_stop(sdk: OpenAI) -> None:
    done = sdk.chat.completions.create(model=MODEL, messages=QUESTION, temperature=0)
    message = done.choices[0].message
    assert message.role == "assistant"
    assert "Paris" in (message.content or "")
    assert done.choices[0].finish_reason == "stop"
    assert done.usage is not None
    assert done.usage.completion_tokens < 20


def test_content_in_parts_equals_one_text(sdk: OpenAI) -> None:
    parts: Any = [{"role": "user", "content": [{"type": "text", "text": QUESTION[0]["content"]}]}]
    whole, split = (
        sdk.chat.completions.create(model=MODEL, messages=messages, temperature=0, max_tokens=8)
        for messages in (QUESTION, parts)
    )
    assert split.choices[0].message.content == whole.choices[0].message.content


def test_several_prompts_are_answered_as_each_alone(sdk: OpenAI) -> None:
    prompts = ["The capital of France is", "One, two, three,"]
    together = sdk.completions.create(model=MODEL, prompt=prompts, max_tokens=5, temperature=0)
    alone = [
        sdk.completions.create(model=MODEL, prompt=prompt, max_tokens=5, temperature=0)
        for prompt in prompts
    ]
    assert [c.text for c in together.choices] == [done.choices[0].text for done in alone]
    assert [c.index for c in together.choices] == [0, 1]


async def test_parallel_streams_equal_whole_answers(server: Server, sdk: OpenAI) -> None:
    """Each stream ends with its usage."""
    prompts = [f"{ONCE_UPON} number {i}" for i in range(4)]
    async with AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:

        async def stream(prompt: str) -> str:
            text, reasons, usages = "", [], []
            chunks = await client.completions.create(
                model=MODEL, prompt=prompt, max_tokens=10, temperature=0, stream=True,
                stream_options={"include_usage": True},
            )  # fmt: skip
            async for chunk in chunks:
                usages += [chunk.usage] if chunk.usage else []
                for choice in chunk.choices:
                    assert not usages, "the usage comes last"
                    text += choice.text
                    reasons.append(choice.finish_reason)
            assert reasons[-1] == "length"
            assert not any(reasons[:-1])
            assert [usage.completion_tokens for usage in usages] == [10]
            return text

        texts = await asyncio.gather(*map(stream, prompts))
    for prompt, text in zip(prompts, texts, strict=True):
        whole = sdk.completions.create(model=MODEL, prompt=prompt, max_tokens=10, temperature=0)
        assert text == whole.choices[0].text


def test_a_streamed_chat_has_role_text_and_usage(sdk: OpenAI) -> None:
    chunks = list(
        sdk.chat.completions.create(
            model=MODEL, messages=QUESTION, temperature=0, stream=True,
            stream_options={"include_usage": True},
        )
    )  # fmt: skip
    assert chunks[0].choices[0].delta.role == "assistant"
    choices = [chunk.choices[0] for chunk in chunks if chunk.choices]
    assert "Paris" in "".join(choice.delta.content or "" for choice in choices)
    assert choices[-1].finish_reason == "stop"
    assert not chunks[-1].choices
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.prompt_tokens > 5
    assert len({chunk.id for chunk in chunks}) == 1


def test_choice_i_uses_seed_plus_i(sdk: OpenAI) -> None:
    def sample(n: int, seed: int) -> list[str]:
        done = sdk.completions.create(
            model=MODEL, prompt=ONCE_UPON, max_tokens=10, temperature=1.0, n=n, seed=seed
        )
        assert [choice.index for choice in done.choices] == list(range(n))
        assert done.usage is not None
        assert done.usage.completion_tokens <= 10 * n
        return [choice.text for choice in done.choices]

    three = sample(3, 7)
    assert len(set(three)) == 3
    assert three == [sample(1, seed)[0] for seed in (7, 8, 9)]


async def test_a_seed_gives_the_same_text_alone_and_in_a_batch(server: Server) -> None:
    async with AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:

        async def sample(seed: int) -> str:
            done = await client.completions.create(
                model=MODEL, prompt=ONCE_UPON, max_tokens=12, temperature=1.2, top_p=0.9, seed=seed
            )
            return done.choices[0].text

        alone = await sample(3)
        batched = await asyncio.gather(*(sample(seed) for seed in range(6)))
    assert batched[3] == alone
    assert len(set(batched)) == 6


@pytest.mark.parametrize("stream", [False, True])
def test_a_stop_string_may_span_two_tokens(sdk: OpenAI, stream: bool) -> None:
    ask: dict[str, Any] = {
        "model": MODEL, "prompt": ONCE_UPON, "max_tokens": 12, "temperature": 0,
    }  # fmt: skip
    whole = sdk.completions.create(**ask).choices[0].text
    words = whole.split(" ")
    stop = f"{words[2][-2:]} {words[3][:2]}"  # ends one token and begins another
    expected = whole[: whole.index(stop)]
    if not stream:
        choice = sdk.completions.create(**ask, stop=[stop, "never"]).choices[0]
        assert (choice.text, choice.finish_reason) == (expected, "stop")
        assert choice.model_extra is not None
        assert choice.model_extra["stop_reason"] == stop
        return
    chunks = list(sdk.completions.create(**ask, stop=stop, stream=True))
    assert "".join(chunk.choices[0].text for chunk in chunks) == expected
    assert chunks[-1].choices[0].finish_reason == "stop"


@pytest.mark.parametrize(
    ("fields", "text", "stop_reason", "count"),
    [
        ({"stop_token_ids": [FULL_STOP]}, " Paris", FULL_STOP, 2),
        ({"stop_token_ids": [FULL_STOP], "include_stop_str_in_output": True},
         " Paris.", FULL_STOP, 2),
        ({"stop": ["Paris."], "min_tokens": 1}, " ", "Paris.", 2),
    ],
)  # fmt: skip
async def test_where_an_answer_ends_and_what_is_shown_of_it(
    client: Client, fields: dict[str, Any], text: str, stop_reason: str | int, count: int
) -> None:
    """Token 0 comes from the prefill replica, the end from the decode replica."""
    body = {"prompt": "The capital of France is", "temperature": 0, "max_tokens": 8}
    done = await post(client, "/v1/completions", body | fields)
    [choice] = done["choices"]
    assert (choice["text"], choice["finish_reason"]) == (text, "stop")
    assert choice["stop_reason"] == stop_reason
    assert done["usage"]["completion_tokens"] == count


@pytest.mark.parametrize(("skip", "end"), [(True, ""), (False, "<|im_end|>")])
async def test_the_end_token_is_shown_on_request(client: Client, skip: bool, end: str) -> None:
    body = {"messages": QUESTION, "temperature": 0, "skip_special_tokens": skip}
    shown, plain = [
        (await post(client, "/v1/chat/completions", body | fields))["choices"][0]
        for fields in ({"include_stop_str_in_output": True}, {})
    ]
    assert shown["message"]["content"] == plain["message"]["content"] + end
    assert shown["finish_reason"] == plain["finish_reason"] == "stop"


def test_logit_bias_forces_a_token(sdk: OpenAI) -> None:
    done = sdk.completions.create(
        model=MODEL, prompt=ONCE_UPON, max_tokens=4, temperature=1.0, logit_bias={"1234": 100},
        extra_body={"return_token_ids": True},
    )  # fmt: skip
    assert done.choices[0].model_extra is not None
    assert done.choices[0].model_extra["token_ids"] == [1234] * 4


@pytest.mark.parametrize("extra", [{"min_tokens": 14}, {"ignore_eos": True}])
def test_an_answer_that_may_not_end_reaches_its_limit(sdk: OpenAI, extra: dict[str, Any]) -> None:
    done = sdk.chat.completions.create(
        model=MODEL, messages=QUESTION, temperature=0, max_completion_tokens=14, extra_body=extra
    )
    assert done.choices[0].finish_reason == "length"
    assert done.usage is not None
    assert done.usage.completion_tokens == 14


def test_models_are_listed_and_retrieved(sdk: OpenAI) -> None:
    assert [model.id for model in sdk.models.list()] == [MODEL]
    card = sdk.models.retrieve(MODEL)
    assert card.object == "model"
    assert card.model_extra is not None
    assert card.model_extra["max_model_len"] == CONTEXT
    with pytest.raises(openai.NotFoundError):
        sdk.models.retrieve("another/model")


def test_errors_name_the_parameter(sdk: OpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as unknown:
        sdk.chat.completions.create(model="another", messages=QUESTION)
    assert unknown.value.param == "model"
    assert unknown.value.status_code == 404
    with pytest.raises(openai.BadRequestError) as hot:
        sdk.chat.completions.create(model=MODEL, messages=QUESTION, temperature=3.0)
    assert hot.value.param == "temperature"
    with pytest.raises(openai.BadRequestError, match=f"maximum context length is {CONTEXT}"):
        sdk.completions.create(model=MODEL, prompt=[5] * CONTEXT)
    with pytest.raises(openai.BadRequestError, match="tools"):
        sdk.chat.completions.create(
            model=MODEL,
            messages=QUESTION,
            tools=[{"type": "function", "function": {"name": "f", "parameters": {}}}],
        )


# --- our own fields and endpoints ---------------------------------------------------------------


async def post(client: Client, path: str, body: Any) -> dict[str, Any]:
    async with client.session.post(f"{client.url}{path}", json=body) as response:
        answer: dict[str, Any] = await response.json()
        assert response.status == 200, answer
        return answer


async def test_token_ids_decode_to_the_text(client: Client) -> None:
    body = {"prompt": ONCE_UPON, "max_tokens": 9, "temperature": 0, "return_token_ids": True}
    choice = (await post(client, "/v1/completions", body))["choices"][0]
    prompt = await post(client, "/tokenize", {"prompt": ONCE_UPON})
    assert choice["prompt_token_ids"] == prompt["tokens"]
    assert len(choice["token_ids"]) == 9
    text = await post(client, "/detokenize", {"tokens": choice["token_ids"]})
    assert text["prompt"] == choice["text"]
    by_ids = await client.ask(prompt["tokens"], 9)
    assert by_ids["choices"][0]["token_ids"] == choice["token_ids"]


@pytest.mark.parametrize("text", ["Hello, world!", "naïve café 日本語 🙂\n\ttabs", " leading", "x"])
async def test_detokenize_inverts_tokenize(client: Client, text: str) -> None:
    tokens = await post(client, "/tokenize", {"prompt": text})
    assert tokens["count"] == len(tokens["tokens"])
    assert tokens["max_model_len"] == CONTEXT
    back = await post(client, "/detokenize", {"tokens": tokens["tokens"]})
    assert back["prompt"] == text


async def test_tokenize_renders_messages(client: Client) -> None:
    tokens = await post(client, "/tokenize", {"messages": QUESTION})
    text = (await post(client, "/detokenize", {"tokens": tokens["tokens"]}))["prompt"]
    assert QUESTION[0]["content"] in text
    assert text.endswith("<|im_start|>assistant\n")


@pytest.mark.parametrize("path", ["/health", "/ping", "/version"])
async def test_status_endpoints_answer(client: Client, path: str) -> None:
    async with client.session.get(client.url + path) as response:
        assert response.status == 200
