"""Types of option values that more than one module of options uses."""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable
from typing import TypeVar

Number = TypeVar("Number", int, float)

_BYTE_UNITS = {"": 1, "b": 1, "kib": 2**10, "mib": 2**20, "gib": 2**30}
_MAX_BYTES = 2**40


def number(
    kind: Callable[[str], Number], name: str, check: Callable[[Number], bool]
) -> Callable[[str], Number]:
    """Return a parser of numbers that pass ``check``; ``name`` describes them in errors."""

    def parse(text: str) -> Number:
        try:
            value = kind(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is not {name}") from None
        if not check(value):
            raise argparse.ArgumentTypeError(f"{text} is not {name}")
        return value

    return parse


def num_bytes(text: str) -> int:
    """Parse a number of bytes, which may have a unit."""
    found = re.fullmatch(r"([0-9]+) ?([a-z]*)", text.lower())
    unit = _BYTE_UNITS.get(found[2]) if found else None
    if not found or unit is None:
        raise argparse.ArgumentTypeError(
            f"{text!r} is not a number of bytes (as in 268435456, 256MiB or 1GiB)"
        )
    value = int(found[1]) * unit
    if not 1 <= value <= _MAX_BYTES:
        raise argparse.ArgumentTypeError(f"{text} is not between 1 byte and 1024GiB")
    return value
