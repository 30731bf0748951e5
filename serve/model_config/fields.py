"""Fields: the keys of a checkpoint's JSON object, read with checks and one-line errors."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

DTYPES = ("float32", "bfloat16", "float16")  # of weights, activations and KV cache


class Fields:
    """The keys of one JSON object. Every failure is a ``ValueError`` that names the key.

    A key whose value is null counts as missing, except in ``is_null``.
    """

    def __init__(self, data: Mapping[str, Any]) -> None:
        self._data = data

    def get(self, key: str, default: Any = None) -> Any:
        """Return the unchecked value."""
        value = self._data.get(key)
        return default if value is None else value

    def is_null(self, key: str) -> bool:
        """Return whether the key is present and null: in some families that is not "missing"."""
        return key in self._data and self._data[key] is None

    def count(self, key: str, default: int | None = None) -> int:
        """Return a positive integer."""
        value = self.get(key, default)
        if type(value) is not int or value < 1:
            raise ValueError(f"{key} is {value!r}; it must be a positive integer")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        """Return a positive number."""
        value = self.get(key, default)
        if not isinstance(value, int | float) or isinstance(value, bool) or not value > 0:
            raise ValueError(f"{key} is {value!r}; it must be a positive number")
        return float(value)

    def optional_number(self, key: str) -> float | None:
        """Return a positive number, or None if it is missing."""
        return None if self.get(key) is None else self.number(key)

    def flag(self, key: str, default: bool = False) -> bool:
        """Return true or false."""
        value = self.get(key, default)
        if not isinstance(value, bool):
            raise ValueError(f"{key} is {value!r}; it must be true or false")
        return value

    def choice(self, key: str, choices: Mapping[str, str], default: str) -> str:
        """Return the entry of ``choices`` for the value; ``default`` is a key of it as well."""
        value = self.get(key, default)
        if value not in choices:
            raise ValueError(f"{key} {value!r} is not supported; supported: {', '.join(choices)}")
        return choices[value]

    def numbers(self, key: str) -> tuple[float, ...]:
        """Return a list of positive numbers; ``()`` if it is missing."""
        values = self.get(key, [])
        if not isinstance(values, list | tuple) or not all(_is_positive(value) for value in values):
            raise ValueError(f"{key} must be a list of positive numbers")
        return tuple(float(value) for value in values)

    def only(self, key: str, *allowed: object) -> None:
        """Refuse any value but ``allowed``, because others change results and are not supported."""
        value = self.get(key)
        if value is not None and value not in allowed:
            supported = ", ".join(repr(choice) for choice in allowed)
            raise ValueError(f"{key} {value!r} is not supported; supported: {supported}")

    def dtype(self) -> str:
        """Return the type of the checkpoint's weights, one of ``DTYPES``."""
        name = str(self.get("dtype") or self.get("torch_dtype", "float32")).removeprefix("torch.")
        if name not in DTYPES:
            raise ValueError(f"dtype {name} is not supported; supported: {', '.join(DTYPES)}")
        return name

    def token_ids(self, key: str) -> tuple[int, ...]:
        """Return one token id or a list of them as a tuple without repetitions."""
        value = self.get(key, [])
        ids = tuple(value) if isinstance(value, list) else (value,)
        if not all(type(token) is int for token in ids):
            raise ValueError(f"{key} {value!r} is neither a token id nor a list of them")
        return tuple(dict.fromkeys(ids))


def _is_positive(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and value > 0
