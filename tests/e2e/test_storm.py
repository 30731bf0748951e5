"""A storm of requests, aborts and malformed bodies: each is answered once and nothing leaks."""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from tests.support.checkpoints import load_reference, reference_greedy, write_llama_checkpoint
from tests.support.clients import Client, events, greedy_body, post_raw
from tests.support.server import serving

NUM_CLIENTS = 100
NUM_PROMPTS = 40
MAX_TOKENS = 24
VOCAB_SIZE = 128
STALL_S = 60.0  # a request that takes longer counts as hung

TINY_POOLS = (
    "--tokenizer", "none", "--num-blocks", "48", "--block-size", "4", "--max-model-len", "128",
    "--max-num-batched-tokens", "16", "--max-num-seqs", "8", "--kv-push-bytes", "8KiB",
)  # fmt: skip

# Every limit on what clients may ask for, so tight that the storm meets it. Each new limit of the
# server belongs here.
LIMITS = (
    "--max-waiting", "64", "--max-waiting-tokens", "4096", "--max-waiting-share", "0.8",
    "--max-body-bytes", "64KiB", "--max-body-bytes-in-work", "128KiB", "--max-field-values", "2000",
    "--max-connections", "400", "--max-connections-per-address", "300", "--header-timeout-s", "30",
    "--body-timeout-s", "30", "--write-timeout-s", "30", "--progress-timeout-s", "60",
)  # fmt: skip

MALFORMED: list[tuple[bytes, int]] = [
    (b"", 400),
    (b"{", 400),
    (b"[1, 2]", 400),
    (b"\xff\xfe{}", 400),
    (b'{"prompt": "text without a tokenizer"}', 400),
    (b'{"prompt": []}', 400),
    (b'{"prompt": [128]}', 400),
    (b'{"prompt": [-1]}', 400),
    (b'{"prompt": [1], "max_tokens": 0}', 400),
    (b'{"prompt": [1], "temperature": "hot"}', 400),
    (b'{"prompt": [1], "n": 1000000}', 400),
    (b'{"prompt": [1], "logprobs": 3}', 400),
    (b'{"prompt": [' + b"1, " * 200 + b"1]}", 400),  # longer than the context
    (b'{"prompt": [1], "model": "another"}', 404),
]


class Refused(Exception):
    """The server was full and said so."""


@dataclass(frozen=True, slots=True)
class Storm:
    """What the clients send and the tokens that they should get."""

    client: Client
    prompts: Sequence[list[int]]
    expected: Sequence[tuple[int, ...]]  # MAX_TOKENS greedy tokens of each prompt

    async def one(self, rng: random.Random) -> str:
        """Send one request of a random kind, check its answer and return how it ended.

        Raises ``Refused`` if the server is full.
        """
        kind = rng.choices(
            (self.whole, self.streamed, self.dropped, self.hung_up, self.malformed),
            (40, 25, 15, 10, 10),
        )[0]
        async with asyncio.timeout(STALL_S):
            return await kind(rng)

    def _draw(self, rng: random.Random) -> tuple[int, int]:
        return rng.randrange(len(self.prompts)), rng.randint(1, MAX_TOKENS)

    async def whole(self, rng: random.Random) -> str:
        """Wait for a whole answer: greedy or sampled, sometimes with several choices."""
        index, count = self._draw(rng)
        n, temperature = rng.choice((1, 1, 1, 3)), rng.choice((0.0, 0.0, 1.0))
        body = greedy_body(self.prompts[index], count) | {"n": n, "temperature": temperature}
        async with self._post(body) as response:
            answer = await response.json()
        assert answer["usage"]["completion_tokens"] == n * count
        assert [choice["index"] for choice in answer["choices"]] == list(range(n))
        for choice in answer["choices"]:
            assert choice["finish_reason"] == "length"
            assert len(choice["token_ids"]) == count
            if temperature == 0.0:
                assert tuple(choice["token_ids"]) == self.expected[index][:count]
        return "answered"

    async def streamed(self, rng: random.Random) -> str:
        """Read a greedy stream to its end."""
        index, count = self._draw(rng)
        tokens, reasons = await self._read(index, count, stop_after=None)
        assert tokens == list(self.expected[index][:count])
        assert reasons == ["length"]
        return "streamed"

    async def dropped(self, rng: random.Random) -> str:
        """Close the connection of a greedy stream after some events."""
        index, count = self._draw(rng)
        tokens, _ = await self._read(index, MAX_TOKENS, stop_after=rng.randint(0, count))
        assert tokens == list(self.expected[index][: len(tokens)])
        return "dropped"

    async def _read(
        self, index: int, count: int, stop_after: int | None
    ) -> tuple[list[int], list[str]]:
        body = greedy_body(self.prompts[index], count) | {"stream": True}
        tokens: list[int] = []
        reasons: list[str] = []
        async with self._post(body) as response:
            async for event in events(response):
                choice = event["choices"][0]
                tokens += choice["token_ids"]
                reasons += [choice["finish_reason"]] if choice["finish_reason"] else []
                if stop_after is not None and len(tokens) >= stop_after:
                    response.close()
                    break
        return tokens, reasons

    @asynccontextmanager
    async def _post(self, body: dict[str, Any]) -> AsyncIterator[aiohttp.ClientResponse]:
        """Send a completion. Raises ``Refused`` if the server is full."""
        url = f"{self.client.url}/v1/completions"
        async with self.client.session.post(url, json=body) as response:
            if response.status == 429:
                assert int(response.headers["Retry-After"]) >= 1
                assert (await response.json())["error"]["code"] == 429
                raise Refused
            assert response.status == 200, await response.text()
            yield response

    async def hung_up(self, rng: random.Random) -> str:
        """Hang up after sending a request, before the answer or after its first bytes."""
        index, count = self._draw(rng)
        body = greedy_body(self.prompts[index], count) | {"stream": rng.random() < 0.5}
        reader, writer = await post_raw(self.client.url, "/v1/completions", body)
        if rng.random() < 0.5:
            await reader.read(rng.choice((1, 100, 1000)))
        if rng.random() < 0.5:
            writer.transport.abort()
        else:
            writer.close()
        return "hung up"

    async def malformed(self, rng: random.Random) -> str:
        """Send a malformed body, which must be refused with its status."""
        body, status = rng.choice(MALFORMED)
        url = f"{self.client.url}/v1/completions"
        async with self.client.session.post(url, data=body) as response:
            error = (await response.json())["error"]
            assert (response.status, error["code"]) == (status, status), (body, error)
            assert set(error) == {"message", "type", "param", "code"}
        return "malformed"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_llama_checkpoint(tmp_path_factory.mktemp("model"), seed=1, vocab_size=VOCAB_SIZE)


@pytest.fixture(scope="module")
def prompts() -> list[list[int]]:
    rng = random.Random(3)
    return [
        [rng.randrange(VOCAB_SIZE) for _ in range(rng.randint(1, 60))] for _ in range(NUM_PROMPTS)
    ]


@pytest.fixture(scope="module")
def expected(model: Path, prompts: list[list[int]]) -> list[tuple[int, ...]]:
    reference = load_reference(model)
    return [reference_greedy(reference, prompt, MAX_TOKENS) for prompt in prompts]


class Turns:
    """Lets a client that was refused try again when a request of another has ended."""

    def __init__(self) -> None:
        self._num_in_flight = 0
        self._ended = asyncio.Condition()

    async def take(self, send: Callable[[], Awaitable[str]]) -> str:
        """Call ``send`` until it is not refused, and return what it returns."""
        while True:
            self._num_in_flight += 1
            try:
                end = await send()
            except Refused:
                self._num_in_flight -= 1
                async with self._ended:
                    if self._num_in_flight:  # without others the next try is one round trip later
                        await self._ended.wait()
                continue
            self._num_in_flight -= 1
            async with self._ended:
                self._ended.notify()
            return end


async def rage(storm: Storm, seed: int, num_requests: int) -> Counter[str]:
    """Send up to ``NUM_CLIENTS`` requests at a time; the first failure ends the storm."""
    print(f"seed={seed}")
    counts: Counter[str] = Counter()
    turns = Turns()
    numbers = iter(range(num_requests))

    async def client() -> None:
        for number in numbers:
            counts[await turns.take(partial(send_one, number))] += 1

    async def send_one(number: int) -> str:
        return await storm.one(random.Random(f"{seed} {number}"))

    async with asyncio.TaskGroup() as group:
        for _ in range(NUM_CLIENTS):
            group.create_task(client())
    return counts


async def check_rest(client: Client) -> list[dict[str, Any]]:
    """Check that the cluster is idle and that every accepted request ended exactly once."""
    replicas = await client.rest()
    accepted = await client.metric("vllm:request_params_max_tokens_count")
    assert await client.metric("vllm:request_success_total") == accepted
    assert accepted > 0
    assert (await client.ask([1, 2, 3], 5))["usage"]["completion_tokens"] == 5
    return replicas


async def run_storm(
    model: Path,
    prompts: list[list[int]],
    expected: list[tuple[int, ...]],
    options: Sequence[str],
    num_requests: int,
) -> None:
    with serving("--model", str(model), *options, *LIMITS, num_ranks=4) as server:
        connector = aiohttp.TCPConnector(limit=0)
        async with aiohttp.ClientSession(connector=connector) as session:
            client = Client(session, server.url)
            counts = await rage(Storm(client, prompts, expected), 5, num_requests)
            print(counts)
            assert counts.total() == num_requests
            assert set(counts) == {"answered", "streamed", "dropped", "hung up", "malformed"}
            replicas = await check_rest(client)
            assert all(replica["num_free_blocks"] == 48 for replica in replicas)
            assert await client.metric("vllm:num_preemptions_total") > 0, "pools were never full"
            assert await client.metric("serve:requests_rejected_total") > 0, "none was refused"
        assert " ERROR " not in server.log
        assert "Traceback" not in server.log


async def test_storm_over_two_prefill_and_two_decode_replicas(
    model: Path, prompts: list[list[int]], expected: list[tuple[int, ...]]
) -> None:
    await run_storm(model, prompts, expected, TINY_POOLS, 300)


async def test_storm_over_two_ranks_each(
    model: Path, prompts: list[list[int]], expected: list[tuple[int, ...]]
) -> None:
    options = (*TINY_POOLS, "--replica-spec", "2,1", "2,1")
    await run_storm(model, prompts, expected, options, 150)


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        [],
        ["--replica-spec", "2,1", "2,1"],
        ["--replica-spec", "2,1", "1,1", "1,1"],
        ["--replica-spec", "1,1", "1,1", "2,1", "--partition-id", "2"],
        ["--dispatch-policy", "round-robin"],
        ["--mode", "colocated"],
    ],
    ids=lambda options: " ".join(options) or "2P+2D",
)
async def test_long_storm(
    model: Path, prompts: list[list[int]], expected: list[tuple[int, ...]], options: list[str]
) -> None:
    pools = [*TINY_POOLS]
    if "colocated" in options:
        del pools[pools.index("--kv-push-bytes") :]
    await run_storm(model, prompts, expected, (*pools, *options), 2000)
