"""Divide what is copied to the device into parts that fit pinned memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import TypeVar

T = TypeVar("T")


def split(
    items: Mapping[int, T], size_of: Callable[[T], int], limit: int
) -> Iterator[dict[int, T]]:
    """Split ``items`` into parts whose sizes add up to at most ``limit``, or of one item."""
    part: dict[int, T] = {}
    total = 0
    for key, item in items.items():
        if part and total + size_of(item) > limit:
            yield part
            part, total = {}, 0
        part[key] = item
        total += size_of(item)
    if part:
        yield part
