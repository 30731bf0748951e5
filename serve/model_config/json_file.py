"""Read one of a checkpoint's JSON files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


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


def read_json_if_any(path: Path) -> dict[str, Any]:
    """Read a JSON object as ``read_json`` does; ``{}`` if there is no such file."""
    return read_json(path) if path.is_file() else {}
