"""Layers that know their shard: which part of a checkpoint's tensor each parameter holds."""

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
    """Part of a tensor of ``shape``: along ``dim``, the ``ranges`` one after another.

    A range may be empty or come twice. ``mean`` is where random weights are to lie around.
    """

    shape: tuple[int, ...]
    ranges: tuple[tuple[int, int], ...]
    dim: int = 0
    mean: float = 0.0

    @property
    def local_shape(self) -> tuple[int, ...]:
        """The shape of the part."""
        size = sum(stop - start for start, stop in self.ranges)
        return (*self.shape[: self.dim], size, *self.shape[self.dim + 1 :])

    @classmethod
    def whole(cls, *shape: int, mean: float = 0.0) -> Shard:
        """All of a tensor."""
        return cls(shape, ((0, shape[0]),), mean=mean)


@dataclass(frozen=True, slots=True)
class Range:
    """``ranges`` of a dimension of ``total`` elements: what one rank holds of it."""

    total: int
    ranges: tuple[tuple[int, int], ...]

    @classmethod
    def even(cls, total: int, tp: TensorParallel) -> Range:
        """Equal parts, rounded up: the last ranks may hold less, or nothing."""
        size = -(-total // tp.size)
        start = min(tp.rank * size, total)
        return cls(total, ((start, min(start + size, total)),))

    @classmethod
    def all(cls, total: int) -> Range:
        """Everything."""
        return cls(total, ((0, total),))

    @classmethod
    def heads(cls, num_heads: int, head_dim: int, heads: tuple[int, ...]) -> Range:
        """The rows of ``heads``, in their order, of ``num_heads`` heads."""
        rows = tuple((head * head_dim, (head + 1) * head_dim) for head in heads)
        return cls(num_heads * head_dim, rows)

    def and_then(self, *others: Range) -> Range:
        """The rows of several tensors that a checkpoint holds as one, this one's first."""
        total, ranges = self.total, list(self.ranges)
        for other in others:
            ranges += [(total + start, total + stop) for start, stop in other.ranges]
            total += other.total
        return Range(total, tuple(ranges))


@dataclass(frozen=True, slots=True)
class Placement:
    """Where parameters are made, and in which type."""

    dtype: torch.dtype
    device: torch.device

    def empty(self, shard: Shard) -> nn.Parameter:
        """A parameter for ``shard``, to be filled by the loader."""
        data = torch.empty(shard.local_shape, dtype=self.dtype, device=self.device)
        return nn.Parameter(data, requires_grad=False)


class ShardedLayer(nn.Module):
    """A layer whose parameters hold parts of checkpoint tensors of the same names."""

    def __init__(self, shards: Mapping[str, Shard | None], place: Placement) -> None:
        super().__init__()
        self.shards = {name: shard for name, shard in shards.items() if shard is not None}
        for name, shard in shards.items():
            self.register_parameter(name, None if shard is None else place.empty(shard))


def parameter_shards(model: nn.Module) -> Iterator[tuple[str, nn.Parameter, Shard]]:
    """Every parameter of ``model`` once, under its first checkpoint name."""
    layers = dict(model.named_modules())
    for name, parameter in model.named_parameters():
        path, _, local = name.rpartition(".")
        layer = layers[path]
        if not isinstance(layer, ShardedLayer):
            raise TypeError(f"{name} belongs to a layer that does not know its shard")
        yield name, parameter, layer.shards[local]


class RMSNorm(ShardedLayer):
    """Scale to unit mean square, in float32, then by a weight per channel."""

    weight: nn.Parameter

    def __init__(
        self, size: int, eps: float, place: Placement, *, around_one: bool = False
    ) -> None:
        """``around_one``: the weights are what is to be added to one (Gemma)."""
        mean = 0.0 if around_one else 1.0
        super().__init__({"weight": Shard.whole(size, mean=mean)}, place)
        self.eps, self.around_one = eps, around_one

    def forward(self, x: Tensor | None, residual: Tensor) -> Tensor:
        """The norm of ``residual + x``, which ``residual`` (``[num_tokens, size]``) becomes.

        Without ``x`` of ``residual`` as it is. Sum and norm are one kernel on a GPU.
        """
        one = self.around_one
        if x is None:
            return ops.rms_norm(residual, self.weight, self.eps, around_one=one)
        return ops.add_rms_norm(x, residual, self.weight, self.eps, around_one=one)


class LayerNorm(ShardedLayer):
    """Scale to zero mean and unit variance, then by a weight and a bias per channel."""

    weight: nn.Parameter
    bias: nn.Parameter

    def __init__(self, size: int, eps: float, place: Placement) -> None:
        whole = Shard.whole(size)
        super().__init__({"weight": Shard.whole(size, mean=1.0), "bias": whole}, place)
        self.eps = eps

    def forward(self, x: Tensor | None, residual: Tensor) -> Tensor:
        """The norm of ``residual + x``, which ``residual`` (``[num_tokens, size]``) becomes."""
        if x is not None:
            residual += x
        return functional.layer_norm(residual, self.weight.shape, self.weight, self.bias, self.eps)


class NoNorm(nn.Module):
    """Where other models have a last norm."""

    def forward(self, x: Tensor | None, residual: Tensor) -> Tensor:
        """``residual + x``."""
        return residual if x is None else residual + x


class ColumnParallelLinear(ShardedLayer):
    """Some of the output features: ``rows`` of the weight. No exchange."""

    weight: nn.Parameter
    bias: nn.Parameter | None

    def __init__(self, in_features: int, rows: Range, bias: bool, place: Placement) -> None:
        weight = Shard((rows.total, in_features), rows.ranges)
        vector = Shard((rows.total,), rows.ranges) if bias else None
        super().__init__({"weight": weight, "bias": vector}, place)

    def forward(self, x: Tensor) -> Tensor:
        """``[num_tokens, in_features]`` to ``[num_tokens, local rows]``."""
        return ops.linear(x, self.weight, self.bias)


class FusedLinear:
    """Column-parallel layers over one input, computed as one product.

    Their parameters become views of its memory, so each is still loaded under its own name.
    """

    def __init__(self, *layers: ColumnParallelLinear) -> None:
        self.weight = _join([layer.weight for layer in layers])
        biases = [layer.bias for layer in layers if layer.bias is not None]
        if len(biases) not in (0, len(layers)):
            raise ValueError("of layers in one product either all have a bias or none")
        self.bias = _join(biases) if biases else None

    def __call__(self, x: Tensor) -> Tensor:
        """``[num_tokens, in_features]`` to the layers' results side by side."""
        return ops.linear(x, self.weight, self.bias)


def _join(parameters: list[nn.Parameter]) -> Tensor:
    """One tensor that holds what the parameters hold, which are views of it from now on."""
    joined = torch.cat([parameter.data for parameter in parameters])
    parts = torch.split(joined, [len(parameter) for parameter in parameters])
    for parameter, part in zip(parameters, parts, strict=True):
        parameter.data = part
    return joined


class RowParallelLinear(ShardedLayer):
    """All output features of some of the input: ``columns`` of the weight, summed over ranks."""

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
        """``[num_tokens, local columns]`` to ``[num_tokens, out_features]``, equal on all ranks."""
        if self.tp.size == 1:
            return ops.linear(x, self.weight, self.bias)
        summand = self.tp.summand((len(x), len(self.weight)), x.dtype)
        out = self.tp.all_reduce(ops.linear(x, self.weight, out=summand))
        return out if self.bias is None else out + self.bias  # once, after the sum


class PositionEmbedding(ShardedLayer):
    """A learned vector for each position; those of ``offset`` rows before them are never read."""

    weight: nn.Parameter

    def __init__(self, num_positions: int, size: int, offset: int, place: Placement) -> None:
        super().__init__({"weight": Shard.whole(num_positions + offset, size)}, place)
        self.offset = offset

    def forward(self, positions: Tensor) -> Tensor:
        """``[num_tokens]`` to ``[num_tokens, size]``."""
        return functional.embedding(positions + self.offset, self.weight)


class VocabParallelEmbedding(ShardedLayer):
    """Some of the vocabulary's vectors; the ranks' results are summed."""

    weight: nn.Parameter

    def __init__(self, vocab_size: int, size: int, tp: TensorParallel, place: Placement) -> None:
        rows = Range.even(vocab_size, tp)
        super().__init__({"weight": Shard((vocab_size, size), rows.ranges)}, place)
        self.tp = tp
        self.start, self.stop = rows.ranges[0]

    def forward(self, token_ids: Tensor) -> Tensor:
        """``[num_tokens]`` to ``[num_tokens, size]``, equal on all ranks."""
        if self.tp.size == 1:
            return functional.embedding(token_ids, self.weight)
        if self.start == self.stop:
            return self.tp.all_reduce(self.weight.new_zeros(len(token_ids), self.weight.shape[1]))
        ours = (token_ids >= self.start) & (token_ids < self.stop)
        vectors = functional.embedding((token_ids - self.start).where(ours, 0), self.weight)
        return self.tp.all_reduce(vectors.masked_fill(~ours[:, None], 0))


class ParallelLMHead(ShardedLayer):
    """Logits over some of the vocabulary, gathered on the leader."""

    weight: nn.Parameter

    def __init__(self, vocab_size: int, size: int, tp: TensorParallel, place: Placement) -> None:
        rows = Range.even(vocab_size, tp)
        super().__init__({"weight": Shard((vocab_size, size), rows.ranges)}, place)
        self.tp = tp
        self.vocab_size = vocab_size

    def forward(self, x: Tensor) -> Tensor | None:
        """``[num_rows, size]`` to ``[num_rows, vocab_size]`` on the leader, else None."""
        if len(x) == 0:  # known to all ranks alike: nothing is exchanged
            return x.new_empty((0, self.vocab_size)) if self.tp.is_leader else None
        logits = ops.linear(x, self.weight)
        # Only the tail of the vocabulary can lie on a shorter shard, so the padding comes last.
        width = math.ceil(self.vocab_size / self.tp.size)
        gathered = self.tp.gather_to_leader(
            functional.pad(logits, (0, width - logits.shape[1])) if self.tp.size > 1 else logits
        )
        # Kernels read rows one right after another: what was padded is copied without it.
        return None if gathered is None else gathered[:, : self.vocab_size].contiguous()
