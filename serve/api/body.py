"""A request's JSON body, and its fields with their types and ranges checked.

``null`` is a field's default everywhere. Unknown fields are ignored.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable
from typing import Any, TypeVar

import msgspec
from aiohttp import web

from serve.api.errors import ApiError

LARGE_BYTES = 4 << 10  # what a larger body needs done is done in a thread
_SLICE_BYTES = 32 << 10

INT64_MIN, INT64_MAX = -(2**63), 2**63 - 1

Result = TypeVar("Result")


class Body:
    """The fields of one JSON object that was ``size`` bytes long."""

    def __init__(self, fields: dict[str, Any], size: int = 0) -> None:
        self.fields = fields
        self.size = size

    async def work(self, function: Callable[[], Result]) -> Result:
        """Call ``function``, whose work grows with the body, so that nobody waits long for it."""
        return await asyncio.to_thread(function) if self.size > LARGE_BYTES else function()

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
    try:
        data = await request.read()
    except web.RequestPayloadError as error:  # it is not what Content-Encoding says, for instance
        reason = f"the body cannot be read: {error}"
        raise ApiError(reason, headers={"Connection": "close"}) from None
    large = len(data) > LARGE_BYTES
    try:
        fields = await asyncio.to_thread(_decode, data) if large else msgspec.json.decode(data)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError, ValueError) as error:
        raise ApiError(f"the body is not valid JSON: {error}") from None
    if not isinstance(fields, dict):
        raise ApiError("the body must be a JSON object")
    return Body(fields, len(data))


# --- long bodies --------------------------------------------------------------------------------
# Decoding holds the interpreter's lock, from a thread as well: 3 ms for 100,000 token ids. So
# fields are decoded one by one, and long lists in slices, between which the event loop has its
# turn.


def _decode(data: bytes) -> Any:
    if not data.lstrip().startswith(b"{"):
        return msgspec.json.decode(data)
    fields = msgspec.json.decode(data, type=dict[str, msgspec.Raw])
    return {name: _decode_value(bytes(raw)) for name, raw in fields.items()}


def _decode_value(raw: bytes) -> Any:
    if len(raw) <= _SLICE_BYTES:
        return msgspec.json.decode(raw)
    match raw[:1], raw[1:].lstrip()[:1]:
        case b"[", b"[":
            parts = msgspec.json.decode(raw, type=list[msgspec.Raw])
            return [_decode_value(bytes(part)) for part in parts]
        case b"[", first if first.isdigit():
            return _decode_numbers(raw)
    return msgspec.json.decode(raw)


def _decode_numbers(raw: bytes) -> list[Any]:
    """A valid JSON array that begins with a number."""
    items: list[Any] = []
    start, end = 1, len(raw) - 1
    try:
        while start <= end:
            comma = raw.find(b",", min(end, start + _SLICE_BYTES), end)
            stop = comma if comma >= 0 else end
            items += msgspec.json.decode(b"[" + raw[start:stop] + b"]")
            start = stop + 1
    except msgspec.DecodeError:  # a comma within a string or a list: there is more than numbers
        return list(msgspec.json.decode(raw))
    return items
