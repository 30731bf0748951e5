"""Read a checkpoint's ModelConfig from disk: config.json, or the header of a GGUF file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from serve.model_config.config import ModelConfig
from serve.model_config.families import parse_config
from serve.model_config.generation_config import read_generation_config
from serve.model_config.gguf_header import read_gguf_config
from serve.model_config.json_file import read_json


def load_model_config(path: str) -> ModelConfig:
    """Read the config of the checkpoint at ``path``: a directory with config.json, or a .gguf file.

    Raises ``ValueError`` with one line if a value is missing, malformed or not supported.
    """
    source = Path(path)
    try:
        data = read_gguf_config(source) if source.suffix == ".gguf" else _read_directory(source)
        return parse_config(data)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def _read_directory(directory: Path) -> dict[str, Any]:
    """Read config.json, with the end tokens of generation_config.json beside its own.

    Fine-tunes often change only one of both files.
    """
    data = read_json(directory / "config.json")
    if ends := read_generation_config(directory).eos_token_ids:
        own = data.get("eos_token_id")
        own = own if isinstance(own, list) else [] if own is None else [own]
        data["eos_token_id"] = [*ends, *own]
    return data
