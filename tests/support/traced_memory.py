"""The memory that Python objects take."""

from __future__ import annotations

import tracemalloc
from collections.abc import Callable


def bytes_left_by(function: Callable[[], object]) -> int:
    """Return how many bytes of Python objects are still held after ``function`` has returned."""
    tracemalloc.start()
    try:
        function()
        return tracemalloc.get_traced_memory()[0]
    finally:
        tracemalloc.stop()
