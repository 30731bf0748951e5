"""A tiny model over HTTP: what is shown of the cluster, and clients that disconnect."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Iterator
from itertools import pairwise
from typing import Any

import aiohttp
import pytest
import pytest_asyncio

from tests.support.checkpoints import write_llama_checkpoint
from tests.support.clients import Client, greedy_body, post_raw
from tests.support.server import Server, serving

CONTEXT = 8192
NUM_STEPS = "vllm:iteration_tokens_total_count"  # of all replicas
# Steps of less than 10 ms that may run between two reads of the cluster's state.
SLACK_STEPS = 300


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    model = write_llama_checkpoint(
        tmp_path_factory.mktemp("model"), seed=1, max_position_embeddings=CONTEXT
    )
    options = ("--tokenizer", "none", "--num-blocks", "1000", "--max-num-batched-tokens", "16")
    with serving("--model", str(model), *options, num_ranks=2) as server:
        yield server


@pytest_asyncio.fixture
async def client(running: Server) -> AsyncIterator[Client]:
    async with aiohttp.ClientSession() as session:
        yield Client(session, running.url)


async def test_the_timeline_is_complete_and_in_order(client: Client) -> None:
    answer = await client.ask([1, 2, 3], 4, return_timeline=True)
    stamps = answer["choices"][0]["timeline"]
    order = [
        "arrived_s", "prefill_queued_s", "prefill_started_s", "prefill_ended_s",
        "transfer_ended_s", "decode_queued_s", "decode_started_s", "finished_s",
    ]  # fmt: skip
    assert set(stamps) == {*order, "transfer_started_s"}
    # Stages across ranks use an offset of their clocks, which has an error.
    error_s = 1e-3
    times = [stamps[name] for name in order]
    assert all(after - before > -error_s for before, after in pairwise(times))
    assert stamps["transfer_started_s"] < stamps["transfer_ended_s"]


async def test_the_cluster_lists_its_replicas(client: Client) -> None:
    prefill, decode = await client.rest()
    assert set(prefill) == {
        "id", "role", "ranks", "tp", "pp", "num_blocks", "num_free_blocks", "num_waiting",
        "num_running", "num_receiving", "num_sending",
    }  # fmt: skip
    assert (prefill["id"], prefill["role"], prefill["ranks"]) == (0, "prefill", [0])
    assert (decode["id"], decode["role"], decode["ranks"]) == (1, "decode", [1])
    assert decode["tp"] == decode["pp"] == 1
    assert decode["num_blocks"] > 0


async def test_metrics_count_tokens(client: Client) -> None:
    names = ("vllm:prompt_tokens_total", "vllm:generation_tokens_total")
    before = [await client.metric(name) for name in names]
    await client.ask([5, 6, 7], 4)
    after = [await client.metric(name) for name in names]
    assert [new - old for new, old in zip(after, before, strict=True)] == [3, 4]
    assert await client.metric("vllm:time_to_first_token_seconds_count") > 0
    async with client.session.head(f"{client.url}/metrics") as head:
        assert head.status == 200
        assert head.content_type == "text/plain"
        assert not await head.read()


# --- clients that disconnect --------------------------------------------------------------------


@pytest.mark.parametrize("stream", [False, True], ids=["waiting", "streaming"])
async def test_a_disconnect_while_decoding_aborts(client: Client, stream: bool) -> None:
    victim = greedy_body([9, 8, 7], 4000) | {"stream": stream}
    await check_disconnect(client, victim, replica=1)


@pytest.mark.parametrize("stream", [False, True], ids=["waiting", "streaming"])
async def test_a_disconnect_during_prefill_aborts(client: Client, stream: bool) -> None:
    victim = greedy_body(random_ids(CONTEXT - 200, 5), 100) | {"stream": stream}
    await check_disconnect(client, victim, replica=0)


async def test_a_disconnect_at_once_leaves_the_cluster_idle(client: Client) -> None:
    _, writer = await post_raw(client.url, "/v1/completions", greedy_body([9, 8, 7], 4000))
    writer.transport.abort()
    await client.rest()
    assert await client.metric(NUM_STEPS) > 0


async def check_disconnect(client: Client, victim: dict[str, Any], replica: int) -> None:
    """Disconnect ``victim`` while ``replica`` runs it; a request beside it must not change."""
    await client.rest()
    neighbour = random_ids(20, 6)
    alone = await client.ask(neighbour, 24)
    reader, writer = await post_raw(client.url, "/v1/completions", victim)
    await client.busy(replica)
    pending = asyncio.create_task(client.ask(neighbour, 24))
    if victim["stream"] and replica == 1:
        await reader.readuntil(b"data: ")
    writer.close()
    num_steps = await client.metric(NUM_STEPS)
    together = await pending
    await client.rest()
    assert together["choices"][0]["token_ids"] == alone["choices"][0]["token_ids"]
    # The victim's prompt has 500 chunks or its answer 4000 tokens, so it did not run to its end.
    assert await client.metric(NUM_STEPS) - num_steps <= 24 + SLACK_STEPS


def random_ids(count: int, seed: int) -> list[int]:
    rng = random.Random(seed)
    return [rng.randrange(128) for _ in range(count)]
