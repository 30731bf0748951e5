"""A tiny model over HTTP: API key, limits and refusals, and jobs split in other ways."""

from __future__ import annotations

import asyncio
import json
import random
import signal
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import aiohttp
import openai
import pytest
import pytest_asyncio
from openai import OpenAI

from tests.support.checkpoints import load_reference, reference_greedy, write_llama_checkpoint
from tests.support.clients import Client, greedy_body
from tests.support.server import Server, serving


@pytest_asyncio.fixture
async def session() -> AsyncIterator[aiohttp.ClientSession]:
    async with aiohttp.ClientSession() as session:
        yield session


KEY = {"Authorization": "Bearer sesame"}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_llama_checkpoint(tmp_path_factory.mktemp("tiny"), seed=1)


@pytest.fixture(scope="module")
def strict(tiny: Path) -> Iterator[Server]:
    options = ["--tokenizer", "none", "--api-key", "sesame", "--max-waiting", "4"]
    options += ["--num-blocks", "32", "--max-model-len", "64"]
    options += ["--served-model-name", "tiny", "alias"]
    with serving("--model", str(tiny), *options, num_ranks=2) as server:
        yield server


async def refused(
    session: aiohttp.ClientSession, url: str, status: int, body: Any, headers: Any = KEY
) -> tuple[str, aiohttp.ClientResponse]:
    """Check that a completion is refused with ``status`` and return the error's message."""
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    async with session.post(f"{url}/v1/completions", data=data, headers=headers) as response:
        answer = await response.json()
        assert response.status == status, answer
        assert set(answer["error"]) == {"message", "type", "param", "code"}
        assert answer["error"]["code"] == status
        return answer["error"]["message"], response


async def test_requests_without_the_api_key_are_refused(
    strict: Server, session: aiohttp.ClientSession
) -> None:
    body = {"prompt": [1, 2, 3], "max_tokens": 2}
    await refused(session, strict.url, 401, body, headers={})
    await refused(session, strict.url, 401, body, headers={"Authorization": "Bearer other"})
    async with session.get(f"{strict.url}/health") as response:
        assert response.status == 200
    wrong = OpenAI(base_url=f"{strict.url}/v1", api_key="other", max_retries=0)
    with wrong, pytest.raises(openai.AuthenticationError):
        wrong.models.list()
    with OpenAI(base_url=f"{strict.url}/v1", api_key="sesame", max_retries=0) as sdk:
        assert [model.id for model in sdk.models.list()] == ["tiny", "alias"]
        done = sdk.completions.create(model="alias", prompt=[1, 2, 3], max_tokens=2)
        assert done.model in ("tiny", "alias")


async def test_requests_beyond_max_waiting_get_429(
    strict: Server, session: aiohttp.ClientSession
) -> None:
    async def four_choices() -> int:
        body = {"prompt": [1, 2, 3], "max_tokens": 2, "n": 4}
        url = f"{strict.url}/v1/completions"
        async with session.post(url, json=body, headers=KEY) as response:
            answer = await response.json()
            if response.status == 429:
                assert int(response.headers["Retry-After"]) >= 1
                assert answer["error"]["code"] == 429
            else:
                assert len(answer["choices"]) == 4
            return response.status

    assert set(await asyncio.gather(*(four_choices() for _ in range(40)))) == {200, 429}


async def test_a_body_that_is_too_large_gets_413(
    strict: Server, session: aiohttp.ClientSession
) -> None:
    await refused(session, strict.url, 413, b'{"prompt": "' + b"x" * (33 << 20) + b'"}')


@pytest.mark.parametrize(
    ("body", "named"),
    [
        ({"prompt": "text"}, "tokenizer"),
        ({"prompt": [1], "stop": "x"}, "stop"),
        ({"prompt": [128]}, "vocabulary"),
        ({"prompt": list(range(64))}, "maximum context length is 64"),
        ({"prompt": [1], "max_tokens": 0}, "max_tokens"),
        ({}, "prompt"),
    ],
)
async def test_refusals_name_the_field(
    strict: Server, session: aiohttp.ClientSession, body: dict[str, Any], named: str
) -> None:
    message, _ = await refused(session, strict.url, 400, body)
    assert named in message


async def test_max_tokens_is_clamped_to_the_context(
    strict: Server, tiny: Path, session: aiohttp.ClientSession
) -> None:
    prompts = [list(range(60)), list(range(3))]
    body = greedy_body([], 1000) | {"prompt": prompts}
    url = f"{strict.url}/v1/completions"
    async with session.post(url, json=body, headers=KEY) as response:
        answer = await response.json()
    reference = load_reference(tiny)
    for prompt, choice in zip(prompts, answer["choices"], strict=True):
        assert choice["finish_reason"] == "length"
        expected = reference_greedy(reference, prompt, 64 - len(prompt))
        assert tuple(choice["token_ids"]) == expected


# --- other shapes of a job ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("num_ranks", "options"),
    [
        (1, []),
        (4, ["--replica-spec", "1,1", "1,1", "2,1", "--partition-id", "2"]),
    ],
    ids=["colocated", "2P+1D, tp 1 to 2"],
)
async def test_other_splits_return_the_references_tokens(
    tiny: Path, session: aiohttp.ClientSession, num_ranks: int, options: list[str]
) -> None:
    rng = random.Random(7)
    prompts = [[rng.randrange(128) for _ in range(rng.randint(1, 60))] for _ in range(6)]
    options = [*options, "--tokenizer", "none", "--num-blocks", "64", "--block-size", "8"]
    options += ["--max-num-batched-tokens", "32"]
    with serving("--model", str(tiny), *options, num_ranks=num_ranks) as server:
        client = Client(session, server.url)
        answers = await asyncio.gather(*(client.ask(prompt, 12) for prompt in prompts))
        await client.rest()
        server.signal_ranks(signal.SIGTERM)
        assert await asyncio.to_thread(server.wait_exited) == 0
        assert " ERROR " not in server.log
    reference = load_reference(tiny)
    for prompt, answer in zip(prompts, answers, strict=True):
        expected = reference_greedy(reference, prompt, 12)
        assert tuple(answer["choices"][0]["token_ids"]) == expected
