"""Convert a decoded JSON object to a typed struct, and say in one line which field is wrong."""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import cache
from typing import Any, TypeVar

import msgspec
from msgspec import inspect

T = TypeVar("T", bound=msgspec.Struct)

_NOUNS: dict[type[inspect.Type], str] = {
    inspect.BoolType: "a boolean",
    inspect.IntType: "an integer",
    inspect.FloatType: "a finite number",
    inspect.StrType: "a string",
    inspect.ListType: "a list",
    inspect.DictType: "an object",
    inspect.StructType: "an object",
}
_MISSING = re.compile(r"Object missing required field `(\w+)`$")
# A field, and the entry of it that is wrong: the index in a list. In an object it is not told.
_FIELD_PATH = re.compile(r"`\$\.([\w.]+)(?:\[(\d+)\])?")
_MAX_SHOWN = 40  # characters of a refused number, which can have thousands


class InvalidField(Exception):
    """A field has a value that cannot be served; ``param`` is its name.

    Not a ``ValueError``, because msgspec would wrap one that a struct's ``__post_init__`` raises.
    """

    def __init__(self, message: str, param: str) -> None:
        super().__init__(message)
        self.param = param


def to_struct(fields: Mapping[str, Any], kind: type[T]) -> T:
    """Convert a JSON object to ``kind``; ``null`` means a default, and unknown names are skipped.

    Fields of type ``Any`` are taken over without a copy, so their length costs nothing here.
    Raises ``InvalidField``.
    """
    # Not a loop over fields, because a body can have a million of them.
    present = {
        name: value for name in kind.__struct_fields__ if (value := fields.get(name)) is not None
    }
    try:
        return msgspec.convert(present, kind, str_keys=True)
    except msgspec.ValidationError as error:
        raise _explain(str(error), present, kind) from None


def shorten(value: object) -> str:
    """Return ``value`` as text for an error message, cut if it is long."""
    text = str(value)
    return text if len(text) <= _MAX_SHOWN else text[:_MAX_SHOWN] + "..."


def _explain(reason: str, value: Any, kind: type[msgspec.Struct]) -> InvalidField:
    """Put msgspec's reason, which ends with a path such as ``$.stop[1]``, into the API's words."""
    if missing := _MISSING.match(reason):
        return InvalidField(f"{missing[1]} is required", missing[1])
    path = _FIELD_PATH.search(reason)
    assert path is not None, reason  # the outermost value is an object, so a field is at fault
    names = path[1].split(".")
    expected: inspect.Type = inspect.type_info(kind)
    for name in names:
        assert isinstance(expected, inspect.StructType)
        expected = _field_types(expected.cls)[name]
        value = value[name]
    requirement = _requirement(expected, value)
    if isinstance(expected, inspect.Metadata):
        requirement += f": {_fault(reason, names[0], value, kind)}"
    return InvalidField(f"{names[-1]} {requirement}", names[-1])


def _fault(reason: str, name: str, value: Any, kind: type[msgspec.Struct]) -> str:
    """Say what is wrong in a field that is a text, a list or an object."""
    path = _FIELD_PATH.search(reason)
    if path is not None and path[2] is not None:
        return f"{name}[{path[2]}] is {_show(value[int(path[2])])}"
    if isinstance(value, dict):
        for key, entry in value.items():
            try:
                msgspec.convert({name: {key: entry}}, kind, str_keys=True)
            except msgspec.ValidationError as error:
                if _FIELD_PATH.search(str(error)):  # else another field is missing
                    return f"entry {_show(key)} is {_show(entry)}"
    if "of length" in reason:
        return f"it has {len(value)} " + ("characters" if isinstance(value, str) else "entries")
    return f"it is {_show(value)}"


def _show(value: Any) -> str:
    """Return ``value`` as JSON, without what can be long."""
    if isinstance(value, str):
        long = len(value) > _MAX_SHOWN
        shown = msgspec.json.encode(value[:_MAX_SHOWN]).decode()
        return f'{shown[:-1]}...", of {len(value)} characters' if long else shown
    if isinstance(value, list | dict):
        return "a list" if isinstance(value, list) else "an object"
    if value is None or isinstance(value, bool):
        return msgspec.json.encode(value).decode()
    return shorten(value)  # a number


@cache
def _field_types(kind: type) -> dict[str, inspect.Type]:
    struct = inspect.type_info(kind)
    assert isinstance(struct, inspect.StructType)
    return {field.name: _without_null(field.type) for field in struct.fields}


def _without_null(kind: inspect.Type) -> inspect.Type:
    if not isinstance(kind, inspect.UnionType):
        return kind
    [only] = (part for part in kind.types if not isinstance(part, inspect.NoneType))
    return only


def _requirement(kind: inspect.Type, value: Any) -> str:
    """``must be a string``, or ``must be in [0, 2], got 3`` for a number outside its range."""
    if isinstance(kind, inspect.Metadata):
        return f"must be {(kind.extra_json_schema or {})['description']}"
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if isinstance(kind, inspect.FloatType) and is_number:
        return f"must be in {_interval(kind)}, got {shorten(value)}"
    if isinstance(kind, inspect.IntType) and is_number and isinstance(value, int):
        return f"must be in {_interval(kind)}, got {shorten(value)}"
    return f"must be {_NOUNS[type(kind)]}"


def _interval(kind: inspect.IntType | inspect.FloatType) -> str:
    low = f"[{_plain(kind.ge)}" if kind.ge is not None else f"({_plain(kind.gt)}"
    return f"{low}, {_plain(kind.le)}]"


def _plain(bound: float | None) -> str:
    return f"{bound:g}" if isinstance(bound, float) else str(bound)
