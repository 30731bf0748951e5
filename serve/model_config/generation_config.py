"""GenerationConfig: what a checkpoint's generation_config.json recommends.

The file is advice. What cannot be used of it is left out and reported, and never stops a start.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from serve.model_config.fields import Fields
from serve.model_config.json_file import read_json_if_any

FILE = "generation_config.json"


@dataclass(frozen=True, slots=True)
class GenerationConfig:
    """The values of the file that are not null, and what had to be left out, one line each."""

    values: dict[str, Any] = field(default_factory=dict)
    eos_token_ids: tuple[int, ...] = ()
    faults: tuple[str, ...] = ()


def read_generation_config(path: Path) -> GenerationConfig:
    """Read the file in the directory ``path``. A .gguf file and many directories have none."""
    try:
        found = read_json_if_any(path / FILE)
    except ValueError as error:
        return GenerationConfig(faults=(f"{error}; it is skipped",))
    values = {name: value for name, value in found.items() if value is not None}
    ends = values.pop("eos_token_id", [])
    ends = [as_whole(end) for end in (ends if isinstance(ends, list) else [ends])]
    try:
        return GenerationConfig(values, Fields({"eos_token_id": ends}).token_ids("eos_token_id"))
    except ValueError as error:
        return GenerationConfig(values, faults=(f"{FILE}: {error}; it is skipped",))


def as_whole(value: Any) -> Any:
    """Return a whole number that is written as a float (50.0) as an int; others as they are."""
    return int(value) if isinstance(value, float) and value.is_integer() else value
