"""SamplingDefaults: sampling parameters for requests that do not set their own."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from serve.model_config.file import read_generation_config
from serve.request import SamplingParams

# The lowest and highest accepted value, for a checkpoint's recommendation and for a request.
RANGES: dict[str, tuple[float, float]] = {
    "temperature": (0.0, 2.0),
    "top_p": (0.0, 1.0),
    "top_k": (-1, math.inf),
    "min_p": (0.0, 1.0),
    "repetition_penalty": (0.0, 1000.0),
}
_ABOVE_ZERO = ("top_p", "repetition_penalty")


@dataclass(frozen=True, slots=True)
class SamplingDefaults:
    """A value for every field of ``SamplingParams`` that a checkpoint can recommend.

    The defaults here are those of the OpenAI API.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0

    def params(self, **requested: Any) -> SamplingParams:
        """Return the ``requested`` values, with defaults for those that are missing or None."""
        chosen = {name: value for name, value in requested.items() if value is not None}
        return SamplingParams(**(asdict(self) | chosen))

    def __str__(self) -> str:
        """Name the values that differ from the OpenAI API's: ``temperature 0.7, top_p 0.8``."""
        plain = asdict(SamplingDefaults())
        changed = {name: value for name, value in asdict(self).items() if value != plain[name]}
        return ", ".join(f"{name} {value:g}" for name, value in changed.items())


def read_sampling_defaults(model: Path) -> SamplingDefaults:
    """Read the recommendations of generation_config.json in the directory ``model``.

    A .gguf file has none. ``do_sample`` is ignored, because it is for callers of transformers that
    set no temperature. Raises ``ValueError`` with one line for a value out of range.
    """
    config = read_generation_config(model)
    found = {name: config[name] for name in RANGES if config.get(name) is not None}
    for name, value in found.items():
        if not _is_valid(name, value):
            raise ValueError(f"{model}: generation_config.json: {name} {value!r} is not supported")
    return SamplingDefaults(**found | {"top_k": max(0, found.get("top_k", 0))})


def _is_valid(name: str, value: Any) -> bool:
    low, high = RANGES[name]
    is_number = isinstance(value, int if name == "top_k" else int | float)
    if not is_number or isinstance(value, bool) or not low <= value <= high:
        return False
    return value > 0 or name not in _ABOVE_ZERO
