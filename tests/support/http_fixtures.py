"""The front end over a fake cluster, on a real socket: the fixtures of the HTTP tests."""

from __future__ import annotations

from collections.abc import AsyncIterator

import aiohttp
import pytest

from serve.tokenizer.tokenizer import Tokenizer
from tests.support.fake_service import FakeCluster, load_test_tokenizer, serving


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    """The test model's."""
    return load_test_tokenizer()


@pytest.fixture
async def cluster(tokenizer: Tokenizer) -> AsyncIterator[FakeCluster]:
    """Has nothing left to do when the test ends."""
    cluster = FakeCluster(tokenizer)
    yield cluster
    cluster.assert_at_rest()


@pytest.fixture
async def url(cluster: FakeCluster) -> AsyncIterator[str]:
    """Where the front end listens."""
    async with serving(cluster.app) as url:
        yield url


@pytest.fixture
async def http(url: str) -> AsyncIterator[aiohttp.ClientSession]:
    """A client of it."""
    async with aiohttp.ClientSession(url) as session:
        yield session
