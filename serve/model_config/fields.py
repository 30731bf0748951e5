"""Fields: a JSON object of a checkpoint, read with checks; every mistake is one line."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

DTYPES = ("float32", "bfloat16", "float16")


class Fields:
    """The keys of one object. Every failure is a ``ValueError`` that names the key.

    Where nothing else is said, a key that is null counts as missing.
    """

    def __init__(self, data: Mapping[str, Any]) -> None:
        self._data = data

    def get(self, key: str, default: Any = None) -> Any:
        """The value as it is."""
        value = self._data.get(key)
        return default if value is None else value

    def is_null(self, key: str) -> bool:
        """Whether the key is there and null, which some families tell from a missing one."""
        return key in self._data and self._data[key] is None

    def count(self, key: str, default: int | None = None) -> int:
        """A positive integer."""
        value = self.get(key, default)
        if type(value) is not int or value < 1:
            raise ValueError(f"{key} is {value!r}; it must be a positive integer")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        """A positive number."""
        value = self.get(key, default)
        if not isinstance(value, int | float) or isinstance(value, bool) or not value > 0:
            raise ValueError(f"{key} is {value!r}; it must be a positive number")
        return float(value)

    def optional_number(self, key: str) -> float | None:
        """A positive number, if there is one."""
        return None if self.get(key) is None else self.number(key)

    def flag(self, key: str, default: bool = False) -> bool:
        """True or false."""
        value = self.get(key, default)
        if not isinstance(value, bool):
            raise ValueError(f"{key} is {value!r}; it must be true or false")
        return value

    def choice(self, key: str, choices: Mapping[str, str], default: str) -> str:
        """What the value stands for among ``choices``."""
        value = self.get(key, default)
        if value not in choices:
            raise ValueError(f"{key} {value!r} is not supported; supported: {', '.join(choices)}")
        return choices[value]

    def numbers(self, key: str) -> tuple[float, ...]:
        """A list of positive numbers; none if it is missing."""
        values = self.get(key, [])
        if not isinstance(values, list | tuple) or not all(_is_positive(value) for value in values):
            raise ValueError(f"{key} must be a list of positive numbers")
        return tuple(float(value) for value in values)

    def only(self, key: str, *allowed: object) -> None:
        """Refuse a value that would change the numbers and that we do not honour."""
        value = self.get(key)
        if value is not None and value not in allowed:
            supported = ", ".join(repr(one) for one in allowed)
            raise ValueError(f"{key} {value!r} is not supported; supported: {supported}")

    def dtype(self) -> str:
        """The type of the checkpoint's numbers, one of ``DTYPES``."""
        name = str(self.get("dtype") or self.get("torch_dtype", "float32")).removeprefix("torch.")
        if name not in DTYPES:
            raise ValueError(f"dtype {name} is not supported; supported: {', '.join(DTYPES)}")
        return name

    def token_ids(self, key: str) -> tuple[int, ...]:
        """A token id, several or none; each once."""
        value = self.get(key, [])
        ids = tuple(value) if isinstance(value, list) else (value,)
        if not all(type(token) is int for token in ids):
            raise ValueError(f"{key} {value!r} is neither a token id nor a list of them")
        return tuple(dict.fromkeys(ids))


def _is_positive(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and value > 0
