"""How requests that leave it open are sampled: what the checkpoint's author recommends."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from serve.model_config.file import read_generation_config
from serve.request import SamplingParams

# Lowest and highest value, also of a request's own.
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
    """One value for each field of ``SamplingParams`` that a checkpoint can recommend.

    Without a recommendation they are the OpenAI API's.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0

    def params(self, **given: Any) -> SamplingParams:
        """``given`` fields, of which those that are None are left open, and the defaults."""
        chosen = {name: value for name, value in given.items() if value is not None}
        return SamplingParams(**(asdict(self) | chosen))

    def __str__(self) -> str:
        """Those that are not the OpenAI API's: ``temperature 0.7, top_p 0.8``."""
        plain = asdict(SamplingDefaults())
        changed = {name: value for name, value in asdict(self).items() if value != plain[name]}
        return ", ".join(f"{name} {value:g}" for name, value in changed.items())


def read_sampling_defaults(model: Path) -> SamplingDefaults:
    """What generation_config.json in the directory ``model`` recommends; nothing in a .gguf file.

    ``do_sample`` is not asked: it is for callers of transformers that give no temperature. Raises
    ``ValueError`` with one line.
    """
    given = read_generation_config(model)
    found = {name: given[name] for name in RANGES if given.get(name) is not None}
    for name, value in found.items():
        if not _is_served(name, value):
            raise ValueError(f"{model}: generation_config.json: {name} {value!r} is not supported")
    return SamplingDefaults(**found | {"top_k": max(0, found.get("top_k", 0))})


def _is_served(name: str, value: Any) -> bool:
    low, high = RANGES[name]
    is_number = isinstance(value, int if name == "top_k" else int | float)
    if not is_number or isinstance(value, bool) or not low <= value <= high:
        return False
    return value > 0 or name not in _ABOVE_ZERO
