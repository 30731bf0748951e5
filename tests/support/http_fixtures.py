"""Fixtures of the HTTP tests: the front end over a fake cluster, on a real socket."""

from __future__ import annotations

from collections.abc import AsyncIterator

import aiohttp
import pytest

from serve.tokenizer.tokenizer import Tokenizer
from tests.support.fake_service import FakeCluster, load_test_tokenizer, serving


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return load_test_tokenizer()


@pytest.fixture
async def cluster(tokenizer: Tokenizer) -> AsyncIterator[FakeCluster]:
    """Make a fake cluster that must be idle when the test ends."""
    cluster = FakeCluster(tokenizer)
    yield cluster
    cluster.assert_at_rest()


@pytest.fixture
async def url(cluster: FakeCluster) -> AsyncIterator[str]:
    async with serving(cluster.app) as url:
        yield url


@pytest.fixture
async def http(url: str) -> AsyncIterator[aiohttp.ClientSession]:
    async with aiohttp.ClientSession(url) as session:
        yield session
