"""Find a checkpoint's files of weights: one file, those in an index, or shards by their names."""

from __future__ import annotations

import re
from pathlib import Path

from serve.model_config.json_file import read_json

# By load format. A checkpoint of several files has an index, FILE.index.json, or only shards that
# are named as model-00001-of-00003.safetensors.
WEIGHT_FILES = {"safetensors": "model.safetensors", "pt": "pytorch_model.bin"}


def has_weights(directory: Path, load_format: str) -> bool:
    """Return whether there are weights in this format.

    Raises ``ValueError`` with one line if they are an incomplete set of shards.
    """
    file = directory / WEIGHT_FILES[load_format]
    if file.is_file() or _index_of(file).is_file():
        return True
    return bool(_find_shards(file))


def find_weight_files(directory: Path, load_format: str) -> dict[Path, list[str] | None]:
    """Return the files with the tensors that an index expects in each; None without an index.

    Returns ``{}`` if there are none. Raises ``ValueError`` with one line if some are missing.
    """
    file = directory / WEIGHT_FILES[load_format]
    if file.is_file():
        return {file: None}
    index = _index_of(file)
    return dict(_read_index(index)) if index.is_file() else dict.fromkeys(_find_shards(file))


def _index_of(file: Path) -> Path:
    return file.with_name(f"{file.name}.index.json")


def _read_index(index: Path) -> dict[Path, list[str]]:
    files: dict[Path, list[str]] = {}
    try:
        for tensor, name in read_json(index)["weight_map"].items():
            if Path(name).name != name:
                raise ValueError(f"{name!r} is not a file name")
            files.setdefault(index.with_name(name), []).append(tensor)
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise ValueError(f"{index} is not a readable index: {error!r}") from None
    absent = sorted(file.name for file in files if not file.is_file())
    if absent:
        raise ValueError(f"{index} lists files that are missing: {_some(absent)}")
    return files


def _find_shards(file: Path) -> list[Path]:
    """Return the shards in order. Their names say how many there are, counted from 1 or from 0."""
    pattern = re.compile(rf"{re.escape(file.stem)}-(\d+)-of-(\d+){re.escape(file.suffix)}")
    found = [match for path in file.parent.iterdir() if (match := pattern.fullmatch(path.name))]
    shards = {int(match[1]): match for match in found}
    if not shards:
        return []
    totals = sorted({int(match[2]) for match in found})
    if len(totals) > 1 or len(shards) < len(found):
        several = _some(sorted(match[0] for match in found))
        raise ValueError(f"{file.parent} holds shards of more than one checkpoint: {several}")
    first = min(1, *shards)
    absent = sorted(set(range(first, first + totals[0])) - shards.keys())
    if absent:
        one = next(iter(shards.values()))
        number = len(one[1])
        names = [f"{file.stem}-{i:0{number}}-of-{one[2]}{file.suffix}" for i in absent]
        raise ValueError(f"{file.parent} lacks shards of its weights: {_some(names)}")
    return [file.with_name(shards[number][0]) for number in sorted(shards)]


def _some(names: list[str]) -> str:
    more = f" and {len(names) - 8} more" if len(names) > 8 else ""
    return ", ".join(names[:8]) + more
