"""Checkpoint: named tensors in safetensors, torch or GGUF files, of which a rank reads its part."""

from __future__ import annotations

import zipfile
from collections.abc import Callable, Container, Iterable
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from serve.model.layers import Shard
from serve.model_config.weight_files import WEIGHT_FILES, find_weight_files


class Checkpoint(Protocol):
    """Named tensors in files. Every failure to read is a ``ValueError`` with one line."""

    def names(self) -> Iterable[str]:
        """Return the names of all tensors, as transformers has them."""
        ...

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of the whole tensor."""
        ...

    def read(self, name: str, shard: Shard) -> Tensor:
        """Read ``shard`` of a tensor: ``shard.local_shape``, on the CPU, of any floating type."""
        ...


class SafetensorsCheckpoint:
    """Memory-mapped safetensors files: only the bytes of the shard are read."""

    def __init__(self, files: dict[Path, list[str] | None]) -> None:
        """``files`` maps each file to the tensors that its index lists; None: there is no index."""
        self._files: dict[str, Any] = {}  # the open file of each tensor
        for path, expected in files.items():
            try:
                handle: Any = safe_open(path, framework="pt")
            except (SafetensorError, OSError) as error:
                raise ValueError(f"{path} is not a readable safetensors file: {error}") from None
            self._files |= dict.fromkeys(
                _expected(path, handle.keys(), expected, self._files), handle
            )

    def names(self) -> Iterable[str]:
        return self._files.keys()

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._files[name].get_slice(name).get_shape())

    def read(self, name: str, shard: Shard) -> Tensor:
        tensor = self._files[name].get_slice(name)
        whole = (slice(None),) * shard.dim
        ranges = [slice(start, stop) for start, stop in shard.ranges if start < stop]
        parts = [tensor[(*whole, part)] for part in ranges]
        return join(parts, shard)


class TorchCheckpoint:
    """Memory-mapped files of ``torch.save``. Only tensors are unpickled, never code."""

    def __init__(self, files: dict[Path, list[str] | None]) -> None:
        """``files`` maps each file to the tensors that its index lists; None: there is no index."""
        self._tensors: dict[str, Tensor] = {}
        for path, expected in files.items():
            tensors = _load_torch(path)
            names = _expected(path, tensors, expected, self._tensors)
            self._tensors |= {name: tensors[name] for name in names}

    def names(self) -> Iterable[str]:
        return self._tensors.keys()

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._tensors[name].shape)

    def read(self, name: str, shard: Shard) -> Tensor:
        return take(self._tensors[name], shard)


class RenamedCheckpoint:
    """A checkpoint under other tensor names than those in its files."""

    def __init__(self, inner: Checkpoint, names: dict[str, str]) -> None:
        """``names`` maps each new name to the name in ``inner``."""
        self._inner, self._names = inner, names

    def names(self) -> Iterable[str]:
        return self._names.keys()

    def shape(self, name: str) -> tuple[int, ...]:
        return self._inner.shape(self._names[name])

    def read(self, name: str, shard: Shard) -> Tensor:
        return self._inner.read(self._names[name], shard)


def with_prefix(checkpoint: Checkpoint, prefix: str, expected: set[str]) -> Checkpoint:
    """Rename tensors whose names lack ``prefix``, or its first parts, to the ``expected`` names.

    Checkpoints of bare models have such names: they lack what the modules around the bare model
    add. With prefix "model.decoder", ``layers.0.fc1.weight`` and ``decoder.layers.0.fc1.weight``
    both become ``model.decoder.layers.0.fc1.weight``. Other names stay, to be reported by
    ``load_weights``.
    """
    parts = prefix.split(".")
    beginnings = [".".join(parts[: n + 1]) + "." for n in range(len(parts))]
    free = expected.difference(checkpoint.names())
    names: dict[str, str] = {}
    for name in checkpoint.names():
        longer = [] if name in expected else [beginning + name for beginning in beginnings]
        full = next((candidate for candidate in longer if candidate in free), name)
        free.discard(full)  # a second tensor for the same name keeps its own and is left over
        names[full] = name
    return RenamedCheckpoint(checkpoint, names)


def take(tensor: Tensor, shard: Shard) -> Tensor:
    """Return ``shard`` of a whole tensor."""
    ranges = [(start, stop - start) for start, stop in shard.ranges if start < stop]
    return join([tensor.narrow(shard.dim, start, size) for start, size in ranges], shard)


def join(parts: list[Tensor], shard: Shard) -> Tensor:
    """Concatenate the ranges of ``shard``; without any, return an empty tensor."""
    if not parts:
        return torch.empty(shard.local_shape)
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=shard.dim)


def open_checkpoint(path: str, load_format: str) -> Checkpoint:
    """Open the checkpoint at ``path``: a directory or a .gguf file.

    ``load_format`` is safetensors, pt, gguf or auto, which takes the first of them that exists.
    Raises ``ValueError`` if there is no such file or it cannot be read.
    """
    source = Path(path)
    if load_format not in ("auto", "safetensors", "pt", "gguf"):
        raise ValueError(f"load format {load_format!r} is not supported")
    if (source.suffix == ".gguf") != (load_format == "gguf") and load_format != "auto":
        raise ValueError(f"{path} cannot be loaded as {load_format}")
    if source.suffix == ".gguf":
        # Not at the top, because every rank would import the package gguf, also for other formats.
        from serve.model.weights.gguf import GGUFCheckpoint

        return GGUFCheckpoint(source)
    formats = [name for name in _CHECKPOINTS if load_format in ("auto", name)]
    for name in formats:
        if files := find_weight_files(source, name):
            return _CHECKPOINTS[name](files)
    names = " or ".join(f"{WEIGHT_FILES[name]}[.index.json]" for name in formats)
    raise ValueError(f"{path} has no weights to load: no {names}, nor shards of it")


_CHECKPOINTS: dict[str, Callable[[dict[Path, list[str] | None]], Checkpoint]] = {
    "safetensors": SafetensorsCheckpoint,
    "pt": TorchCheckpoint,
}


def _expected(
    path: Path, present: Iterable[str], expected: list[str] | None, known: Container[str]
) -> list[str]:
    """Return all names in a file, after checking that the expected ones are among them.

    Without an index no other file may have the same tensors: these are ``known``.
    """
    names = list(present)
    repeated = [name for name in names if name in known] if expected is None else []
    if repeated:
        raise ValueError(f"{path} repeats tensors of another shard: {', '.join(repeated[:8])}")
    absent = sorted(set(expected or ()) - set(names))
    if absent:
        raise ValueError(f"{path} lacks tensors that its index lists: {', '.join(absent[:8])}")
    return names


def _load_torch(path: Path) -> dict[str, Tensor]:
    try:
        # Only the zip format, which torch writes since 1.6, can be memory-mapped.
        tensors = torch.load(
            path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path)
        )
    except Exception as error:  # a corrupt file makes the unpickler raise anything
        reason = str(error).strip().splitlines()[0] if str(error).strip() else repr(error)
        raise ValueError(f"{path} is not a readable torch checkpoint: {reason}") from error
    if not isinstance(tensors, dict) or not all(isinstance(t, Tensor) for t in tensors.values()):
        raise ValueError(f"{path} contains something other than named tensors")
    return tensors
