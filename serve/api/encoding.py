"""Encode answers whose lists are long, in slices, so that the event loop runs between two."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec

_SLICE = 4096  # items

_encode = msgspec.json.Encoder().encode


def json_list(items: Sequence[Any]) -> Any:
    """Return ``items`` for an answer: as they are, or as encoded JSON if they are many."""
    if len(items) <= _SLICE:
        return items
    slices = (items[start : start + _SLICE] for start in range(0, len(items), _SLICE))
    return msgspec.Raw(b"[" + b",".join([_encode(part)[1:-1] for part in slices]) + b"]")
