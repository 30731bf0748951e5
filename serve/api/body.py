"""A request's JSON body, and its fields with their types and ranges checked.

``null`` is a field's default everywhere. Unknown fields are ignored.
"""

from __future__ import annotations

import asyncio
import math
from typing import Any

import msgspec
from aiohttp import web

from serve.api.errors import ApiError

LARGE_BYTES = 64 << 10  # above this the event loop is not held up with parsing

INT64_MIN, INT64_MAX = -(2**63), 2**63 - 1


class Body:
    """The fields of one JSON object."""

    def __init__(self, fields: dict[str, Any]) -> None:
        self.fields = fields

    def get(self, name: str) -> Any:
        """The raw value; None where it is absent."""
        return self.fields.get(name)

    def boolean(self, name: str, default: bool = False) -> bool:
        """A JSON boolean."""
        value = self.fields.get(name)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise ApiError(f"{name} must be a boolean", param=name)
        return value

    def integer(self, name: str, default: int, low: int = INT64_MIN, high: int = INT64_MAX) -> int:
        """A JSON integer within ``[low, high]``."""
        value = self.fields.get(name)
        if value is None:
            return default
        if not is_integer(value):
            raise ApiError(f"{name} must be an integer", param=name)
        if not low <= value <= high:
            raise ApiError(f"{name} must be in [{low}, {high}], got {value}", param=name)
        return int(value)

    def number(self, name: str, default: float, low: float, high: float) -> float:
        """A finite JSON number within ``[low, high]``."""
        value = self.fields.get(name)
        if value is None:
            return default
        if not is_number(value):
            raise ApiError(f"{name} must be a finite number", param=name)
        if not low <= value <= high:
            raise ApiError(f"{name} must be in [{low}, {high}], got {value}", param=name)
        return float(value)

    def text(self, name: str) -> str | None:
        """A JSON string."""
        value = self.fields.get(name)
        if value is not None and not isinstance(value, str):
            raise ApiError(f"{name} must be a string", param=name)
        return value

    def mapping(self, name: str) -> dict[str, Any]:
        """A JSON object; empty where it is absent."""
        value = self.fields.get(name)
        if value is None:
            return {}
        if not isinstance(value, dict):
            raise ApiError(f"{name} must be an object", param=name)
        return value


def is_integer(value: object) -> bool:
    """Whether a JSON value is an integer (a boolean is none)."""
    return isinstance(value, int) and not isinstance(value, bool)


def is_number(value: object) -> bool:
    """Whether a JSON value is a number that arithmetic can use."""
    if isinstance(value, float):
        return math.isfinite(value)
    return isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**1000


async def read_body(request: web.Request) -> Body:
    """The JSON object that the request carries; 400 if it carries none, 413 if it is too large."""
    data = await request.read()
    try:
        if len(data) > LARGE_BYTES:
            fields = await asyncio.to_thread(msgspec.json.decode, data)
        else:
            fields = msgspec.json.decode(data)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError, ValueError) as error:
        raise ApiError(f"the body is not valid JSON: {error}") from None
    if not isinstance(fields, dict):
        raise ApiError("the body must be a JSON object")
    return Body(fields)
