"""Load weights: each rank reads its shard, and every checkpoint tensor is accounted for."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from serve.model.layers import Shard, parameter_shards
from serve.model.weights.checkpoint import Checkpoint, open_checkpoint, take, with_prefix
from serve.model.weights.staged_copies import StagedCopies

# Tables and masks in old checkpoints that are not weights: the config determines them.
_BUFFERS = re.compile(r".*\b(rotary_emb\.(inv_freq|cos_cached|sin_cached)|attn\.(masked_)?bias)")
_DUMMY_STD = 0.02


class _Target(NamedTuple):
    names: list[str]  # checkpoint keys; more than one if the parameter is tied
    parameter: nn.Parameter
    shard: Shard


def load_weights(
    model: nn.Module,
    path: str,
    load_format: str,
    seed: int,
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """Fill every parameter of ``model`` from the checkpoint at ``path``.

    ``load_format`` is auto, safetensors, pt, gguf or dummy. Dummy weights are random and depend on
    ``seed`` and the tensor's name alone, not on how it is sharded. ``progress`` is called with
    (tensors loaded, all tensors). Raises one ``ValueError`` that names all tensors that are
    missing, left over or of another shape.
    """
    targets = _targets(model)
    checkpoint = None
    if load_format != "dummy":
        expected = {name for target in targets for name in target.names}
        checkpoint = open_checkpoint(path, load_format)
        checkpoint = with_prefix(checkpoint, getattr(model, "base_prefix", ""), expected)
        targets = _as_stored(targets, checkpoint, path)
    with StagedCopies(next(model.parameters()).device) as copies:
        for number, (names, parameter, shard) in enumerate(targets, start=1):
            if checkpoint is None:
                _randomise(parameter, names[0], shard, seed)
            else:
                copies.add(parameter.detach(), checkpoint.read(names[0], shard))
            if progress is not None:
                progress(number, len(targets))
    if checkpoint is not None:
        for (_, *others), parameter, shard in targets:
            for name in others:
                _compare(parameter, checkpoint.read(name, shard), name, path)


def _targets(model: nn.Module) -> list[_Target]:
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    return [_Target(names[id(p)], p, shard) for _, p, shard in parameter_shards(model)]


def _as_stored(targets: list[_Target], checkpoint: Checkpoint, path: str) -> list[_Target]:
    """Reduce ``targets`` to the names that ``checkpoint`` has: for a tied parameter, at least one.

    Raises ``ValueError`` if tensors are missing, left over or of another shape.
    """
    present = set(checkpoint.names())
    stored = [t._replace(names=[name for name in t.names if name in present]) for t in targets]
    missing = [t.names[0] for t, found in zip(targets, stored, strict=True) if not found.names]
    extra = present.difference(*(t.names for t in stored))
    shapes = [
        f"{name} is {list(checkpoint.shape(name))} instead of {list(t.shard.shape)}"
        for t in stored
        for name in t.names
        if checkpoint.shape(name) != t.shard.shape
    ]
    faults = [
        f"{what} {_listed(names)}"
        for what, names in (
            ("missing:", missing),
            ("left over:", [name for name in extra if not _BUFFERS.fullmatch(name)]),
            ("shape:", shapes),
        )
        if names
    ]
    if faults:
        raise ValueError(f"the weights in {path} do not fit the model; {'; '.join(faults)}")
    return stored


def _listed(names: Iterable[str], limit: int = 8) -> str:
    ordered = sorted(names)
    more = f" and {len(ordered) - limit} more" if len(ordered) > limit else ""
    return ", ".join(ordered[:limit]) + more


def _compare(parameter: nn.Parameter, tensor: Tensor, name: str, path: str) -> None:
    """Check that the second copy of a tied tensor has equal values."""
    if not torch.equal(parameter, tensor.to(parameter)):
        raise ValueError(f"{path}: {name} is tied by config.json but has other values")


def _randomise(parameter: nn.Parameter, name: str, shard: Shard, seed: int) -> None:
    """Draw the whole tensor and take the shard, so that any sharding gives the same model."""
    digest = hashlib.blake2b(f"{seed} {name}".encode(), digest_size=8).digest()
    generator = torch.Generator(parameter.device)
    generator.manual_seed(int.from_bytes(digest, "little") >> 1)
    full = torch.empty(shard.shape, dtype=parameter.dtype, device=parameter.device)
    full.normal_(shard.mean, _DUMMY_STD, generator=generator)
    with torch.no_grad():
        parameter.copy_(take(full, shard))
