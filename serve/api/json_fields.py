"""Decode the JSON object of a body, so that other threads can run meanwhile.

Decoding holds the interpreter's lock, in a thread as well: 3 ms for 100,000 token ids. So of a
large body only the fields that mean something are decoded, one by one, and long lists in slices.
A field of very many values is refused before it is decoded, because some of it, for instance an
object, can only be decoded at a stretch.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import msgspec

from serve.api.errors import ApiError
from serve.api.unsupported import UNSUPPORTED
from serve.api.work_pool import SMALL_BYTES

_SLICE_BYTES = 32 << 10


def decode_fields(data: bytes, kind: type[msgspec.Struct], max_values: int) -> dict[str, Any]:
    """Return the fields of a JSON object; 400 for anything else.

    A field may have ``max_values`` values: strings (names of fields too), lists, objects and their
    other items. Lists of token ids do not count.
    """
    try:
        small = len(data) <= SMALL_BYTES
        fields = msgspec.json.decode(data) if small else _decode(data, kind, max_values)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError, ValueError) as error:
        raise ApiError(f"the body is not valid JSON: {error}") from None
    if not isinstance(fields, dict):
        raise ApiError("the body must be a JSON object")
    return fields


def _decode(data: bytes, kind: type[msgspec.Struct], max_values: int) -> Any:
    """Decode the fields that ``kind`` has or that must be refused; skip others without a copy."""
    if not data.lstrip().startswith(b"{"):
        msgspec.json.decode(data, type=msgspec.Raw)  # raises where it is not JSON
        return None
    raw = msgspec.json.decode(data, type=_raw_fields(kind))
    return {
        name: _decode_field(name, bytes(value), max_values)
        for name in raw.__struct_fields__
        if isinstance(value := getattr(raw, name), msgspec.Raw)
    }


@cache
def _raw_fields(kind: type[msgspec.Struct]) -> type[msgspec.Struct]:
    names = {*kind.__struct_fields__, *UNSUPPORTED}
    return msgspec.defstruct(
        "RawFields",
        [(name, msgspec.Raw | msgspec.UnsetType, msgspec.UNSET) for name in sorted(names)],
    )


def _decode_field(name: str, raw: bytes, max_values: int) -> Any:
    if len(raw) > _SLICE_BYTES and _has_too_many_values(raw, max_values):
        raise ApiError(
            f"{name} must not have more than {max_values} values (--max-field-values)", param=name
        )
    return _decode_value(raw)


def _has_too_many_values(raw: bytes, max_values: int) -> bool:
    """Return whether valid JSON has more values; plain token ids do not count."""
    if raw.startswith(b'"'):
        return False
    unescaped = raw.replace(b"\\\\", b"").replace(b'\\"', b"")
    num_strings = unescaped.count(b'"') // 2
    if num_strings > max_values:
        return True
    outside = b"".join(unescaped.split(b'"')[::2])  # of strings
    num_values = num_strings + outside.count(b"[") + outside.count(b"{")
    if num_values > max_values:
        return True
    if num_strings == 0 and b"{" not in outside and _has_plain_lists(outside):
        return False  # they are decoded in slices
    return num_values + outside.count(b",") > max_values


def _has_plain_lists(raw: bytes) -> bool:
    """Return whether what follows a list of numbers is never a number."""
    rests = (part.lstrip(b", \t\r\n") for part in raw.split(b"]"))
    return all(rest[:1] in (b"", b"[") for rest in rests)


def _decode_value(raw: bytes) -> Any:
    if len(raw) <= _SLICE_BYTES:
        return msgspec.json.decode(raw)
    match raw[:1], raw[1:].lstrip()[:1]:
        case b"[", b"[" | b"{" | b'"':
            parts = msgspec.json.decode(raw, type=list[msgspec.Raw])
            return [_decode_value(bytes(part)) for part in parts]
        case b"[", first if first.isdigit():
            return _decode_numbers(raw)
    return msgspec.json.decode(raw)


def _decode_numbers(raw: bytes) -> list[Any]:
    """Decode a valid JSON array that begins with a number."""
    items: list[Any] = []
    start, end = 1, len(raw) - 1
    try:
        while start <= end:
            comma = raw.find(b",", min(end, start + _SLICE_BYTES), end)
            stop = comma if comma >= 0 else end
            items += msgspec.json.decode(b"[" + raw[start:stop] + b"]")
            start = stop + 1
    except msgspec.DecodeError:  # a slice ended within a string or a list: not only numbers
        return list(msgspec.json.decode(raw))
    return items
