"""Checkpoint files and how to read part of a tensor out of them: safetensors, torch, GGUF."""

from __future__ import annotations

import zipfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from serve.model.layers import Shard
from serve.model.weights.gguf import GGUFCheckpoint
from serve.model_config.file import read_json


class Checkpoint(Protocol):
    """Named tensors in files. Every failure to read is a ``ValueError`` of one line."""

    def names(self) -> Iterable[str]:
        """The tensors, by the names they have in transformers."""
        ...

    def shape(self, name: str) -> tuple[int, ...]:
        """The full shape of a tensor."""
        ...

    def read(self, name: str, shard: Shard) -> Tensor:
        """``shard`` of a tensor, on the CPU, in any floating type."""
        ...


class SafetensorsCheckpoint:
    """Memory-mapped safetensors files: only the bytes of the shard are read."""

    def __init__(self, files: dict[Path, list[str] | None]) -> None:
        """``files``: the tensors expected in each file; None: all that it has."""
        self._files: dict[str, Any] = {}  # the open file of each tensor
        for path, expected in files.items():
            try:
                handle: Any = safe_open(path, framework="pt")
            except (SafetensorError, OSError) as error:
                raise ValueError(f"{path} is not a readable safetensors file: {error}") from None
            self._files |= dict.fromkeys(_expected(path, handle.keys(), expected), handle)

    def names(self) -> Iterable[str]:
        """See ``Checkpoint``."""
        return self._files.keys()

    def shape(self, name: str) -> tuple[int, ...]:
        """See ``Checkpoint``."""
        return tuple(self._files[name].get_slice(name).get_shape())

    def read(self, name: str, shard: Shard) -> Tensor:
        """See ``Checkpoint``."""
        tensor = self._files[name].get_slice(name)
        whole = (slice(None),) * shard.dim
        ranges = [slice(start, stop) for start, stop in shard.ranges if start < stop]
        parts = [tensor[(*whole, part)] for part in ranges]
        return join(parts, shard)


class TorchCheckpoint:
    """Memory-mapped files of ``torch.save``, of which nothing but tensors is unpickled."""

    def __init__(self, files: dict[Path, list[str] | None]) -> None:
        """``files``: the tensors expected in each file; None: all that it has."""
        self._tensors: dict[str, Tensor] = {}
        for path, expected in files.items():
            tensors = _load_torch(path)
            self._tensors |= {name: tensors[name] for name in _expected(path, tensors, expected)}

    def names(self) -> Iterable[str]:
        """See ``Checkpoint``."""
        return self._tensors.keys()

    def shape(self, name: str) -> tuple[int, ...]:
        """See ``Checkpoint``."""
        return tuple(self._tensors[name].shape)

    def read(self, name: str, shard: Shard) -> Tensor:
        """See ``Checkpoint``."""
        return take(self._tensors[name], shard)


class RenamedCheckpoint:
    """A checkpoint whose tensors go by names that its files do not use."""

    def __init__(self, inner: Checkpoint, names: dict[str, str]) -> None:
        """``names``: by the name that a tensor goes by, the one that ``inner`` has for it."""
        self._inner, self._names = inner, names

    def names(self) -> Iterable[str]:
        """See ``Checkpoint``."""
        return self._names.keys()

    def shape(self, name: str) -> tuple[int, ...]:
        """See ``Checkpoint``."""
        return self._inner.shape(self._names[name])

    def read(self, name: str, shard: Shard) -> Tensor:
        """See ``Checkpoint``."""
        return self._inner.read(self._names[name], shard)


def with_prefix(checkpoint: Checkpoint, prefix: str, wanted: set[str]) -> Checkpoint:
    """``checkpoint`` by ``wanted`` names, also where its own lack ``prefix`` or its first parts.

    So bare models are published: without what the modules around them add to their tensors' names.
    """
    parts = prefix.split(".")
    beginnings = [".".join(parts[: n + 1]) + "." for n in range(len(parts))]
    free = wanted.difference(checkpoint.names())
    names: dict[str, str] = {}
    for name in checkpoint.names():
        longer = [] if name in wanted else [beginning + name for beginning in beginnings]
        full = next((one for one in longer if one in free), name)
        free.discard(full)  # of two tensors for one name the second is left over
        names[full] = name
    return RenamedCheckpoint(checkpoint, names)


def take(tensor: Tensor, shard: Shard) -> Tensor:
    """``shard`` of a full tensor."""
    ranges = [(start, stop - start) for start, stop in shard.ranges if start < stop]
    return join([tensor.narrow(shard.dim, start, size) for start, size in ranges], shard)


def join(parts: list[Tensor], shard: Shard) -> Tensor:
    """The ranges of ``shard`` as one tensor; none: an empty one."""
    if not parts:
        return torch.empty(shard.local_shape)
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=shard.dim)


def open_checkpoint(path: str, load_format: str) -> Checkpoint:
    """The checkpoint at ``path``: a directory, or a .gguf file.

    ``load_format``: safetensors, pt, gguf, or auto: what is there, in this order.
    """
    source = Path(path)
    if load_format not in ("auto", "safetensors", "pt", "gguf"):
        raise ValueError(f"load format {load_format!r} is not known")
    if (source.suffix == ".gguf") != (load_format == "gguf") and load_format != "auto":
        raise ValueError(f"{path} cannot be loaded as {load_format}")
    if source.suffix == ".gguf":
        return GGUFCheckpoint(source)
    kinds: list[tuple[str, str, Callable[[dict[Path, list[str] | None]], Checkpoint]]] = [
        ("safetensors", "model.safetensors", SafetensorsCheckpoint),
        ("pt", "pytorch_model.bin", TorchCheckpoint),
    ]
    wanted = [kind for kind in kinds if load_format in ("auto", kind[0])]
    for _, name, make in wanted:
        files = _files(source, name)
        if files:
            return make(files)
    names = " or ".join(f"{name}[.index.json]" for _, name, _ in wanted)
    raise ValueError(f"{path} has no weights to load: no {names}")


def _files(directory: Path, name: str) -> dict[Path, list[str] | None]:
    """The single file ``name``, or the files its index lists, each with its tensors."""
    single, index = directory / name, directory / f"{name}.index.json"
    if single.is_file():
        return {single: None}
    if not index.is_file():
        return {}
    try:
        weight_map = read_json(index)["weight_map"]
        files: dict[Path, list[str] | None] = {}
        for tensor, file in weight_map.items():
            if Path(file).name != file:
                raise ValueError(f"{file!r} is not a file name")
            names = files.setdefault(directory / file, [])
            assert names is not None
            names.append(tensor)
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise ValueError(f"{index} is not a readable index: {error!r}") from None
    return files


def _expected(path: Path, present: Iterable[str], expected: list[str] | None) -> list[str]:
    """All of a file's tensors, after checking that those expected are among them."""
    names = list(present)
    absent = sorted(set(expected or ()) - set(names))
    if absent:
        raise ValueError(f"{path} lacks what its index promises: {', '.join(absent[:8])}")
    return names


def _load_torch(path: Path) -> dict[str, Tensor]:
    try:
        # Only files in torch's zip form, which is what it has written since 1.6, can be mapped.
        tensors = torch.load(
            path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path)
        )
    except Exception as error:  # garbage makes the unpickler raise whatever it meets
        reason = str(error).strip().splitlines()[0] if str(error).strip() else repr(error)
        raise ValueError(f"{path} is not a readable torch checkpoint: {reason}") from error
    if not isinstance(tensors, dict) or not all(isinstance(t, Tensor) for t in tensors.values()):
        raise ValueError(f"{path} holds something else than named tensors")
    return tensors
