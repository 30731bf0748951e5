"""Eight ranks without options: four prefill and four decode replicas that answer a chat."""

from __future__ import annotations

from typing import Any

import aiohttp
import pytest
from openai import AsyncOpenAI

from tests.support.clients import Client
from tests.support.server import serving

QUESTION: Any = [{"role": "user", "content": "What is the capital of France?"}]


@pytest.mark.slow
async def test_eight_ranks_split_into_halves_and_answer() -> None:
    with serving(num_ranks=8) as server:
        async with AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none") as sdk:
            done = await sdk.chat.completions.create(
                model="SmolLM2-135M-Instruct", messages=QUESTION, temperature=0
            )
        assert "Paris" in (done.choices[0].message.content or "")
        async with aiohttp.ClientSession() as session:
            replicas = await Client(session, server.url).rest()
        assert [replica["role"] for replica in replicas] == ["prefill"] * 4 + ["decode"] * 4
        assert [replica["ranks"] for replica in replicas] == [[rank] for rank in range(8)]
