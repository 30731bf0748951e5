"""The end of a job: drained, stopped by signals, with a lost rank, or standing still."""

from __future__ import annotations

import asyncio
import os
import re
import signal
from collections.abc import AsyncIterator
from pathlib import Path

import aiohttp
import psutil
import pytest
import pytest_asyncio

from tests.support.checkpoints import write_llama_checkpoint
from tests.support.clients import Client, events, greedy_body
from tests.support.odd_rank import SLOW, STUCK
from tests.support.server import Server, serving

# More tokens than a request gets before its test ends the job.
ENDLESS = 30_000
EXIT_S = 8.0  # ranks exit within 5 s of a lost connection; the rest is slack

ONE_TO_ONE = ("--tokenizer", "none", "--num-blocks", "2100")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_llama_checkpoint(
        tmp_path_factory.mktemp("model"), seed=1, max_position_embeddings=32768
    )


@pytest_asyncio.fixture
async def session() -> AsyncIterator[aiohttp.ClientSession]:
    async with aiohttp.ClientSession() as session:
        yield session


async def all_exited(server: Server, timeout_s: float = EXIT_S) -> int:
    """Wait until every process of the job has exited and return torchrun's exit status."""
    pids = list(server.rank_pids().values())
    status = await asyncio.to_thread(server.wait_exited, timeout_s)
    assert not [pid for pid in pids if is_alive(pid)]
    return status


def is_alive(pid: int) -> bool:
    try:
        return bool(psutil.Process(pid).status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


async def error_event(response: aiohttp.ClientResponse) -> str:
    """Read a stream to its end and return the message of the error that ends it."""
    last: dict[str, object] = {}
    async for event in events(response):
        assert "error" not in last, "an event followed the error"
        last = event
    error = last["error"]
    assert isinstance(error, dict)
    assert set(error) == {"message", "type", "param", "code"}
    return str(error["message"])


# --- stopped by a signal ------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_a_signal_lets_open_streams_finish(
    model: Path, session: aiohttp.ClientSession, number: signal.Signals
) -> None:
    """The ranks get SIGINT twice, because torchrun may pass a Ctrl-C on more than once."""
    with serving("--model", str(model), *ONE_TO_ONE, num_ranks=2) as server:
        client = Client(session, server.url)
        response = await client.open_stream([1, 2, 3], 600)
        waiting = asyncio.create_task(client.ask([4, 5, 6], 400))
        while await client.metric("vllm:prompt_tokens_total") < 6:
            pass
        server.signal_ranks(number)
        await asyncio.to_thread(server.wait_log, "stopping; 2 requests are still open")
        if number == signal.SIGINT:
            server.signal_ranks(number)
        body = greedy_body([1], 1)
        async with session.post(f"{server.url}/v1/completions", json=body) as refused:
            assert refused.status == 503
            assert int(refused.headers["Retry-After"]) >= 1
            assert "shutting down" in (await refused.json())["error"]["message"]
        async with session.get(f"{server.url}/health") as health:
            assert health.status == 503
        chunks = [event async for event in events(response)]
        assert 1 + sum(len(chunk["choices"][0]["token_ids"]) for chunk in chunks) >= 599
        assert chunks[-1]["choices"][0]["finish_reason"] == "length"
        assert (await waiting)["usage"]["completion_tokens"] == 400
        assert await all_exited(server) == 0  # torchrun returns 0 only if every rank does


async def test_a_second_sigterm_ends_open_streams_at_once(
    model: Path, session: aiohttp.ClientSession
) -> None:
    with serving("--model", str(model), *ONE_TO_ONE, num_ranks=2) as server:
        response = await Client(session, server.url).open_stream([1, 2, 3], ENDLESS)
        server.signal_ranks(signal.SIGTERM)
        await asyncio.to_thread(server.wait_log, "stopping; 1 requests are still open")
        server.signal_ranks(signal.SIGTERM)
        assert "shutting down" in await error_event(response)
        assert await all_exited(server) == 0


async def test_draining_ends_after_its_timeout(model: Path, session: aiohttp.ClientSession) -> None:
    options = ("--drain-timeout-s", "0.5")
    with serving("--model", str(model), *ONE_TO_ONE, *options, num_ranks=2) as server:
        response = await Client(session, server.url).open_stream([1, 2, 3], ENDLESS)
        os.kill(server.rank_pids()[0], signal.SIGTERM)  # the others exit with rank 0
        assert "shutting down" in await error_event(response)
        assert await all_exited(server) == 0


async def test_a_sigterm_to_torchrun_lets_open_streams_finish(
    model: Path, session: aiohttp.ClientSession
) -> None:
    with serving("--model", str(model), *ONE_TO_ONE, num_ranks=2) as server:
        response = await Client(session, server.url).open_stream([1, 2, 3], 500)
        server.torchrun.terminate()
        chunks = [event async for event in events(response)]
        assert chunks[-1]["choices"][0]["finish_reason"] == "length"
        await all_exited(server)
        assert 'File "' + os.getcwd() + "/serve/" not in server.log


async def test_a_sigterm_while_loading_ends_the_job(model: Path) -> None:
    options = ("--model", str(model), *ONE_TO_ONE)
    with serving(*options, num_ranks=2, ready=False) as server:
        await asyncio.to_thread(server.wait_listening)
        os.kill(server.rank_pids()[0], signal.SIGTERM)
        assert await all_exited(server) == 0


# --- a lost rank --------------------------------------------------------------------------------


async def test_a_killed_rank_ends_the_job(model: Path, session: aiohttp.ClientSession) -> None:
    with serving("--model", str(model), *ONE_TO_ONE, num_ranks=2) as server:
        response = await Client(session, server.url).open_stream([1, 2, 3], ENDLESS)
        os.kill(server.rank_pids()[1], signal.SIGKILL)
        assert "rank 1" in await error_event(response)
        assert await all_exited(server) != 0
        assert re.search(r"serve: rank 0 stops: .*rank 1\b", server.log)


async def test_a_killed_rank_0_ends_the_other_ranks(
    model: Path, session: aiohttp.ClientSession
) -> None:
    with serving("--model", str(model), *ONE_TO_ONE, num_ranks=3) as server:
        response = await Client(session, server.url).open_stream([1, 2, 3], ENDLESS)
        os.kill(server.rank_pids()[0], signal.SIGKILL)
        with pytest.raises(aiohttp.ClientPayloadError):
            await error_event(response)
        assert await all_exited(server) != 0
        for rank in (1, 2):
            assert re.search(rf"serve: rank {rank} stops: .*rank 0\b", server.log)


async def test_a_killed_follower_ends_the_job(model: Path, session: aiohttp.ClientSession) -> None:
    options = ("--replica-spec", "1,1", "2,1")
    with serving("--model", str(model), *ONE_TO_ONE, *options, num_ranks=3) as server:
        response = await Client(session, server.url).open_stream([1, 2, 3], ENDLESS)
        os.kill(server.rank_pids()[2], signal.SIGKILL)
        assert "rank " in await error_event(response)
        assert await all_exited(server) != 0
        assert re.search(r"serve: (rank 0 stops|error): .*rank [12]\b", server.log)


async def test_no_rank_outlives_torchrun(model: Path, session: aiohttp.ClientSession) -> None:
    with serving("--model", str(model), *ONE_TO_ONE, num_ranks=2) as server:
        pids = list(server.rank_pids().values())
        response = await Client(session, server.url).open_stream([1, 2, 3], ENDLESS)
        server.torchrun.kill()
        assert "torchrun has ended" in await error_event(response)
        await all_exited(server)
        assert not [pid for pid in pids if is_alive(pid)]


# --- standing still -----------------------------------------------------------------------------


async def test_a_stopped_rank_ends_the_job(model: Path, session: aiohttp.ClientSession) -> None:
    options = ("--model", str(model), *ONE_TO_ONE, "--progress-timeout-s", "3")
    with serving(*options, num_ranks=2) as server:
        pids = server.rank_pids()
        response = await Client(session, server.url).open_stream([1, 2, 3], ENDLESS)
        os.kill(pids[1], signal.SIGSTOP)
        assert "rank 1 has been silent" in await error_event(response)
        await asyncio.to_thread(server.wait_log, r"serve: rank 0 stops: rank 1 has been silent")
        await asyncio.to_thread(server.wait_rank_exited, pids[0], EXIT_S)
        os.kill(pids[1], signal.SIGCONT)  # torchrun would kill it after 30 s
        assert await all_exited(server) != 0


async def test_a_stopped_rank_0_ends_the_others(model: Path) -> None:
    options = ("--model", str(model), *ONE_TO_ONE, "--progress-timeout-s", "3")
    with serving(*options, num_ranks=2) as server:
        pids = server.rank_pids()
        os.kill(pids[0], signal.SIGSTOP)
        await asyncio.to_thread(server.wait_log, r"serve: rank 1 stops: rank 0 has been silent")
        await asyncio.to_thread(server.wait_rank_exited, pids[1], EXIT_S)
        os.kill(pids[0], signal.SIGCONT)
        assert await all_exited(server) != 0


async def test_a_slow_step_is_waited_for_and_a_stuck_one_ends_the_job(
    model: Path, session: aiohttp.ClientSession
) -> None:
    """A step whose layers take less than the limit may take longer than the limit."""
    limit_s = 2.0
    options = ("--model", str(model), *ONE_TO_ONE, "--progress-timeout-s", str(limit_s))
    # Rank 1 decodes. Its first step computes token 0, which the bias sets.
    with serving(*options, num_ranks=2, entry="tests.support.odd_rank") as server:
        client = Client(session, server.url)
        begun_s = asyncio.get_running_loop().time()
        answer = await client.ask([1, 2], 2, logit_bias={str(SLOW): 100})
        assert answer["choices"][0]["token_ids"][0] == SLOW
        assert asyncio.get_running_loop().time() - begun_s > limit_s, "the step was not slow"
        response = await client.open_stream([1, 2], 8, logit_bias={str(STUCK): 100})
        reason = await error_event(response)
        assert "rank 1 has made no progress with a step of 1 sequences and 1 tokens" in reason
        assert await all_exited(server) != 0
        assert "serve: rank 0 stops: rank 1 has made no progress" in server.log
