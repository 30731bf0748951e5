"""Layers that know their shard: which part of a checkpoint tensor each parameter holds.

Tensor parallelism follows Megatron-LM (arXiv:1909.08053): a column-parallel layer computes some
output features on each rank, and the row-parallel layer after it sums over ranks.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from serve.comm.tensor_parallel import TensorParallel
from serve.model.kernels import ops


@dataclass(frozen=True, slots=True)
class Shard:
    """Part of a checkpoint tensor of ``shape``: the ``ranges`` of ``dim``, concatenated.

    A range ``(start, stop)`` may be empty or occur twice. ``mean`` is the mean of dummy weights.
    """

    shape: tuple[int, ...]
    ranges: tuple[tuple[int, int], ...]
    dim: int = 0
    mean: float = 0.0

    @property
    def local_shape(self) -> tuple[int, ...]:
        size = sum(stop - start for start, stop in self.ranges)
        return (*self.shape[: self.dim], size, *self.shape[self.dim + 1 :])

    @classmethod
    def whole(cls, *shape: int, mean: float = 0.0) -> Shard:
        """Return the shard that is the whole tensor."""
        return cls(shape, ((0, shape[0]),), mean=mean)


@dataclass(frozen=True, slots=True)
class Range:
    """The part of a dimension of ``total`` elements that one rank holds, as ``(start, stop)``."""

    total: int
    ranges: tuple[tuple[int, int], ...]

    @classmethod
    def even(cls, total: int, tp: TensorParallel) -> Range:
        """Split into equal parts, rounded up: the last ranks may hold fewer elements, or none."""
        size = -(-total // tp.size)
        start = min(tp.rank * size, total)
        return cls(total, ((start, min(start + size, total)),))

    @classmethod
    def all(cls, total: int) -> Range:
        return cls(total, ((0, total),))

    @classmethod
    def heads(cls, num_heads: int, head_dim: int, heads: tuple[int, ...]) -> Range:
        """Return the rows of ``heads``, in the order given, in a tensor of ``num_heads`` heads."""
        rows = tuple((head * head_dim, (head + 1) * head_dim) for head in heads)
        return cls(num_heads * head_dim, rows)

    def and_then(self, *others: Range) -> Range:
        """Return this range and ``others`` as one, in a tensor that concatenates theirs."""
        total, ranges = self.total, list(self.ranges)
        for other in others:
            ranges += [(total + start, total + stop) for start, stop in other.ranges]
            total += other.total
        return Range(total, tuple(ranges))


@dataclass(frozen=True, slots=True)
class Placement:
    """The device and type of a model's parameters."""

    dtype: torch.dtype
    device: torch.device

    def empty(self, shard: Shard) -> nn.Parameter:
        """Make an uninitialised parameter for ``shard``; ``load_weights`` fills it."""
        data = torch.empty(shard.local_shape, dtype=self.dtype, device=self.device)
        return nn.Parameter(data, requires_grad=False)


class ShardedLayer(nn.Module):
    """A layer whose parameters are shards of the checkpoint tensors of the same names."""

    def __init__(self, shards: Mapping[str, Shard | None], place: Placement) -> None:
        super().__init__()
        self.shards = {name: shard for name, shard in shards.items() if shard is not None}
        for name, shard in shards.items():
            self.register_parameter(name, None if shard is None else place.empty(shard))


def parameter_shards(model: nn.Module) -> Iterator[tuple[str, nn.Parameter, Shard]]:
    """Yield every parameter once, with its checkpoint key (the first one if it is tied) and shard.

    Raises ``TypeError`` for a parameter of a layer that is not a ``ShardedLayer``.
    """
    layers = dict(model.named_modules())
    for name, parameter in model.named_parameters():
        path, _, local = name.rpartition(".")
        layer = layers[path]
        if not isinstance(layer, ShardedLayer):
            raise TypeError(f"{name} belongs to a layer that is not a ShardedLayer")
        yield name, parameter, layer.shards[local]


class RMSNorm(ShardedLayer):
    """Scale to unit mean square in float32, then by a weight per channel (arXiv:1910.07467)."""

    weight: nn.Parameter

    def __init__(
        self, size: int, eps: float, place: Placement, *, unit_offset: bool = False
    ) -> None:
        """``unit_offset``: scale by ``1 + weight`` (Gemma)."""
        mean = 0.0 if unit_offset else 1.0
        super().__init__({"weight": Shard.whole(size, mean=mean)}, place)
        self.eps, self.unit_offset = eps, unit_offset

    def forward(self, x: Tensor | None, residual: Tensor) -> Tensor:
        """Add ``x`` to ``residual`` in place and return the norm of the sum.

        Without ``x`` return the norm of ``residual``. All are ``[num_tokens, size]``. Addition and
        norm are one kernel on a GPU.
        """
        offset = self.unit_offset
        if x is None:
            return ops.rms_norm(residual, self.weight, self.eps, unit_offset=offset)
        return ops.add_rms_norm(x, residual, self.weight, self.eps, unit_offset=offset)


class LayerNorm(ShardedLayer):
    """Scale to zero mean and unit variance, then by a weight and a bias per channel."""

    weight: nn.Parameter
    bias: nn.Parameter

    def __init__(self, size: int, eps: float, place: Placement) -> None:
        whole = Shard.whole(size)
        super().__init__({"weight": Shard.whole(size, mean=1.0), "bias": whole}, place)
        self.eps = eps

    def forward(self, x: Tensor | None, residual: Tensor) -> Tensor:
        """Add ``x`` to ``residual`` in place and return the norm: all ``[num_tokens, size]``."""
        if x is not None:
            residual += x
        return functional.layer_norm(residual, self.weight.shape, self.weight, self.bias, self.eps)


class NoNorm(nn.Module):
    """Takes the place of the final norm in models without one."""

    def forward(self, x: Tensor | None, residual: Tensor) -> Tensor:
        return residual if x is None else residual + x


class ColumnParallelLinear(ShardedLayer):
    """Compute the output features ``rows`` of a linear layer; no communication."""

    weight: nn.Parameter
    bias: nn.Parameter | None

    def __init__(self, in_features: int, rows: Range, bias: bool, place: Placement) -> None:
        weight = Shard((rows.total, in_features), rows.ranges)
        vector = Shard((rows.total,), rows.ranges) if bias else None
        super().__init__({"weight": weight, "bias": vector}, place)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``[num_tokens, in_features]`` to ``[num_tokens, local_out_features]``."""
        return ops.linear(x, self.weight, self.bias)


class FusedLinear:
    """Several column-parallel layers with the same input, run as one matrix product.

    Their parameters become views of one weight, so each still loads under its own checkpoint key.
    """

    def __init__(self, *layers: ColumnParallelLinear) -> None:
        self.weight = _join([layer.weight for layer in layers])
        biases = [layer.bias for layer in layers if layer.bias is not None]
        if len(biases) not in (0, len(layers)):
            raise ValueError("fused layers must either all have a bias or all have none")
        self.bias = _join(biases) if biases else None

    def __call__(self, x: Tensor) -> Tensor:
        """Map ``[num_tokens, in_features]`` to the layers' outputs, concatenated in order."""
        return ops.linear(x, self.weight, self.bias)


def _join(parameters: list[nn.Parameter]) -> Tensor:
    """Concatenate the parameters and make each a view of the result."""
    joined = torch.cat([parameter.data for parameter in parameters])
    parts = torch.split(joined, [len(parameter) for parameter in parameters])
    for parameter, part in zip(parameters, parts, strict=True):
        parameter.data = part
    return joined


class RowParallelLinear(ShardedLayer):
    """A linear layer over the input features ``columns``, summed over ranks."""

    weight: nn.Parameter
    bias: nn.Parameter | None

    def __init__(
        self, columns: Range, out_features: int, bias: bool, tp: TensorParallel, place: Placement
    ) -> None:
        weight = Shard((out_features, columns.total), columns.ranges, dim=1)
        vector = Shard.whole(out_features) if bias else None
        super().__init__({"weight": weight, "bias": vector}, place)
        self.tp = tp

    def forward(self, x: Tensor) -> Tensor:
        """Map ``[num_tokens, local_in_features]`` to ``[num_tokens, out_features]``.

        The result is the same on all ranks.
        """
        if self.tp.size == 1:
            return ops.linear(x, self.weight, self.bias)
        # The product is written to memory from which the sum is faster, if there is any.
        summand = self.tp.summand((len(x), len(self.weight)), x.dtype)
        out = self.tp.all_reduce(ops.linear(x, self.weight, out=summand))
        return (
            out if self.bias is None else out + self.bias
        )  # after the sum, so that it counts once


class PositionEmbedding(ShardedLayer):
    """Learned position vectors; position 0 is row ``offset`` of the table."""

    weight: nn.Parameter

    def __init__(self, num_positions: int, size: int, offset: int, place: Placement) -> None:
        super().__init__({"weight": Shard.whole(num_positions + offset, size)}, place)
        self.offset = offset

    def forward(self, positions: Tensor) -> Tensor:
        """Map positions ``[num_tokens]`` to ``[num_tokens, size]``."""
        return functional.embedding(positions + self.offset, self.weight)


class VocabParallelEmbedding(ShardedLayer):
    """Token embedding with the vocabulary split over ranks, whose results are summed."""

    weight: nn.Parameter

    def __init__(self, vocab_size: int, size: int, tp: TensorParallel, place: Placement) -> None:
        rows = Range.even(vocab_size, tp)
        super().__init__({"weight": Shard((vocab_size, size), rows.ranges)}, place)
        self.tp = tp
        self.start, self.stop = rows.ranges[0]

    def forward(self, token_ids: Tensor) -> Tensor:
        """Map token ids ``[num_tokens]`` to ``[num_tokens, size]``, the same on all ranks."""
        if self.tp.size == 1:
            return functional.embedding(token_ids, self.weight)
        if self.start == self.stop:  # no part of the vocabulary is on this rank
            return self.tp.all_reduce(self.weight.new_zeros(len(token_ids), self.weight.shape[1]))
        is_local = (token_ids >= self.start) & (token_ids < self.stop)  # [num_tokens]
        vectors = functional.embedding((token_ids - self.start).where(is_local, 0), self.weight)
        return self.tp.all_reduce(vectors.masked_fill(~is_local[:, None], 0))


class ParallelLMHead(ShardedLayer):
    """The LM head with the vocabulary split over ranks; logits are gathered on the leader."""

    weight: nn.Parameter

    def __init__(self, vocab_size: int, size: int, tp: TensorParallel, place: Placement) -> None:
        rows = Range.even(vocab_size, tp)
        super().__init__({"weight": Shard((vocab_size, size), rows.ranges)}, place)
        self.tp = tp
        self.vocab_size = vocab_size

    def forward(self, x: Tensor) -> Tensor | None:
        """Map ``[num_rows, size]`` to logits ``[num_rows, vocab_size]``; None off the leader."""
        if len(x) == 0:  # the same on all ranks, so none of them communicates
            return x.new_empty((0, self.vocab_size)) if self.tp.is_leader else None
        logits = ops.linear(x, self.weight)  # [num_rows, local vocabulary]
        # Only the last shards can be shorter, so all padding is behind the vocabulary.
        width = math.ceil(self.vocab_size / self.tp.size)
        gathered = self.tp.gather_to_leader(
            functional.pad(logits, (0, width - logits.shape[1])) if self.tp.size > 1 else logits
        )
        # Sampling kernels need contiguous rows, so cutting off padding copies.
        return None if gathered is None else gathered[:, : self.vocab_size].contiguous()
