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
_FIELD_PATH = re.compile(r"`\$\.([\w.]+)")  # up to the index of a list or a key, if there is one
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
    return InvalidField(f"{names[-1]} {_requirement(expected, value)}", names[-1])


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
