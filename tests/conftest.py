"""Set up the test process before anything imports torch, and set time limits by marker."""

from __future__ import annotations

import os

import pytest

# The processes of a test share few cores, so each gets one thread: this one and those it starts.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
# Tests run without a model hub.
os.environ["HF_HUB_OFFLINE"] = "1"

SLOW_TIMEOUT_S = 1200


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Give slow and GPU tests more time than ``timeout`` in setup.cfg unless they set their own."""
    for item in items:
        is_long = item.get_closest_marker("slow") or item.get_closest_marker("gpu")
        if is_long and not item.get_closest_marker("timeout"):
            item.add_marker(pytest.mark.timeout(SLOW_TIMEOUT_S))


# Fixtures that several test files use.
from tests.support.http_fixtures import cluster, http, tokenizer, url  # noqa: E402, F401
from tests.support.world import world  # noqa: E402, F401
