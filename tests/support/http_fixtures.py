"""Fixtures of the HTTP tests: the front end of a fake cluster on a real socket."""

from __future__ import annotations

from collections.abc import AsyncIterator

import aiohttp
import pytest

from serve.tokenizer.tokenizer import Tokenizer
from tests.support.fake_service import FakeCluster, load_test_tokenizer, serving


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    """Load the test model's tokenizer."""
    return load_test_tokenizer()


@pytest.fixture
async def cluster(tokenizer: Tokenizer) -> AsyncIterator[FakeCluster]:
    """Yield a fake cluster; after the test, assert that no request is left."""
    cluster = FakeCluster(tokenizer)
    yield cluster
    cluster.assert_at_rest()


@pytest.fixture
async def url(cluster: FakeCluster) -> AsyncIterator[str]:
    """Yield the address of the front end."""
    async with serving(cluster.app) as url:
        yield url


@pytest.fixture
async def http(url: str) -> AsyncIterator[aiohttp.ClientSession]:
    """Yield a client of the front end."""
    async with aiohttp.ClientSession(url) as session:
        yield session
