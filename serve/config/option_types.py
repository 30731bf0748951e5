"""Types of option values: parsers of the text that the user gives, with their errors."""

from __future__ import annotations

import argparse
import math
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


COUNT = number(int, "a whole number of at least 1", lambda value: value >= 1)
PORT = number(int, "a port (0 to 65535)", lambda value: 0 <= value <= 65535)
SEED = number(int, "a seed (0 to 2**63 - 1)", lambda value: 0 <= value < 2**63)
INDEX = number(int, "a whole number", lambda value: True)
SECONDS = number(
    float, "a number of seconds of at least 0", lambda value: math.isfinite(value) and value >= 0
)
OVERCOMMIT = number(
    float, "a factor of at least 1", lambda value: math.isfinite(value) and value >= 1
)
PERIOD = number(
    float, "a number of seconds above 0", lambda value: math.isfinite(value) and value > 0
)
FRACTION = number(float, "a fraction above 0 and at most 1", lambda value: 0 < value <= 1)
BLOCK_SIZE = number(
    int, "a power of two of at least 1", lambda value: value >= 1 and value & (value - 1) == 0
)


def text(value: str) -> str:
    if not value.strip():
        raise argparse.ArgumentTypeError("is empty")
    return value


def word(text: str) -> str:
    if not text or not text.isprintable() or any(char.isspace() for char in text):
        raise argparse.ArgumentTypeError(f"{text!r} is empty or contains whitespace")
    return text


def token(text: str) -> str:
    # Clients send it in an HTTP header, where other characters could never match.
    if not re.fullmatch(r"[!-~]+", text):
        raise argparse.ArgumentTypeError("must be printable ASCII without whitespace")
    return text


def replica_spec(text: str) -> tuple[int, int]:
    found = re.fullmatch(r"([0-9]+),([0-9]+)", text)
    if not found or "0" in (found[1].lstrip("0") or "0", found[2].lstrip("0") or "0"):
        raise argparse.ArgumentTypeError(f"{text!r} is not of the form TP,PP (as in 2,1)")
    return int(found[1]), int(found[2])
