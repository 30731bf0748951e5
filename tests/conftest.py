"""Settings of the test process, made before anything imports torch, and time limits by marker."""

from __future__ import annotations

import os

import pytest

# Worlds of several processes share few cores: one thread each, here and in what the tests start.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
# No test may depend on a model hub.
os.environ["HF_HUB_OFFLINE"] = "1"

SLOW_TIMEOUT_S = 1200


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Give slow and GPU tests more time than ``timeout`` in setup.cfg, if they name none."""
    for item in items:
        lengthy = item.get_closest_marker("slow") or item.get_closest_marker("gpu")
        if lengthy and not item.get_closest_marker("timeout"):
            item.add_marker(pytest.mark.timeout(SLOW_TIMEOUT_S))


# Fixtures that several files of tests use.
from tests.support.http_fixtures import cluster, http, tokenizer, url  # noqa: E402, F401
from tests.support.world import world  # noqa: E402, F401
