"""SamplingDefaults: sampling parameters for requests that do not set their own."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

from serve.model_config.generation_config import FILE, GenerationConfig, as_whole
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
_MAX_NEW_TOKENS = "max_new_tokens"
_WHOLE = ("top_k", _MAX_NEW_TOKENS)


@dataclass(frozen=True, slots=True)
class SamplingDefaults:
    """A value for every field of ``SamplingParams`` that a checkpoint can recommend.

    The defaults here are those of the OpenAI API. ``max_tokens`` is None if nothing is recommended:
    then it depends on the endpoint.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    max_tokens: int | None = None

    def params(self, **requested: Any) -> SamplingParams:
        """Return the ``requested`` values, with defaults for those that are missing or None."""
        chosen = {name: value for name, value in requested.items() if value is not None}
        known = {name: value for name, value in asdict(self).items() if value is not None}
        return SamplingParams(**(known | chosen))

    def __str__(self) -> str:
        """Name the values that differ from the OpenAI API's: ``temperature 0.7, top_p 0.8``."""
        plain = asdict(SamplingDefaults())
        changed = {name: value for name, value in asdict(self).items() if value != plain[name]}
        return ", ".join(f"{name} {value:g}" for name, value in changed.items())


def read_sampling_defaults(config: GenerationConfig, warnings: list[str]) -> SamplingDefaults:
    """Return the recommendations of ``config``.

    Appends to ``warnings`` what is not usable and is skipped. ``do_sample`` is ignored, because it
    is for callers of transformers that set no temperature.
    """
    found: dict[str, Any] = {}
    for name in (*RANGES, _MAX_NEW_TOKENS):
        value = config.values.get(name)
        value = as_whole(value) if name in _WHOLE else value
        if _is_valid(name, value):
            found[name] = value
        elif value is not None:
            warnings.append(f"{FILE}: {name} {value!r} is not supported; it is skipped")
    found["top_k"] = max(0, found.get("top_k", 0))
    return SamplingDefaults(max_tokens=found.pop(_MAX_NEW_TOKENS, None), **found)


def _is_valid(name: str, value: Any) -> bool:
    if isinstance(value, bool) or not isinstance(value, int if name in _WHOLE else int | float):
        return False
    low, high = RANGES.get(name, (1, math.inf))
    return low <= value <= high and (value > 0 or name not in _ABOVE_ZERO)
