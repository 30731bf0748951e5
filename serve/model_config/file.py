"""Read a checkpoint's ModelConfig from disk: config.json, or the header of a GGUF file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from serve.model_config.config import ModelConfig
from serve.model_config.families import parse_config
from serve.model_config.gguf_header import read_gguf_config


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


def read_generation_config(path: Path) -> dict[str, Any]:
    """Read generation_config.json of a directory; ``{}`` if it has none or ``path`` is a file."""
    file = path / "generation_config.json"
    return read_json(file) if file.exists() else {}


def _read_directory(directory: Path) -> dict[str, Any]:
    """Read config.json; end tokens in generation_config.json take precedence over its own."""
    data = read_json(directory / "config.json")
    eos = read_generation_config(directory).get("eos_token_id")
    data["eos_token_id"] = data.get("eos_token_id") if eos is None else eos
    return data


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object. Raises ``ValueError`` with one line that names the file."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"there is no {path.name}") from None
    except (OSError, ValueError) as error:
        raise ValueError(f"{path.name} cannot be read: {error}") from None
    if not isinstance(data, dict):
        raise ValueError(f"{path.name} is not a JSON object")
    return data
