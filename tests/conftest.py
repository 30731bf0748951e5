"""Set up the test process before torch is imported; set time limits, and put long files first."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

# The processes of a test share few cores, so each gets one thread: this one and those it starts.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
# Tests run without a model hub.
os.environ["HF_HUB_OFFLINE"] = "1"

SLOW_TIMEOUT_S = 1200
# Each takes half a minute or longer. One that came last would keep one worker busy while the others
# have nothing left to do. pytest-xdist keeps this order with --no-loadscope-reorder.
LONG_FILES = (
    "e2e/test_lifecycle.py", "e2e/test_matrix.py", "e2e/test_storm.py", "bench/test_sweep.py",
    "e2e/test_refused_start.py", "e2e/test_server.py", "e2e/test_llm.py", "e2e/test_examples.py",
    "model/test_parity.py", "e2e/test_server_limits.py",
)  # fmt: skip


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Sort ``LONG_FILES`` to the front; give slow and GPU tests more time than setup.cfg's.

    A test's own ``timeout`` stays.
    """
    ranks = {Path(__file__).parent / name: rank for rank, name in enumerate(LONG_FILES)}
    items.sort(key=lambda item: ranks.get(item.path, len(ranks)))
    for item in items:
        is_long = item.get_closest_marker("slow") or item.get_closest_marker("gpu")
        if is_long and not item.get_closest_marker("timeout"):
            item.add_marker(pytest.mark.timeout(SLOW_TIMEOUT_S))


# Fixtures that several test files use.
from tests.support.http_fixtures import cluster, http, tokenizer, url  # noqa: E402, F401
from tests.support.world import world  # noqa: E402, F401
