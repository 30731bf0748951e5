"""Linear layers whose weights GPT-2 stores transposed (Conv1D in transformers)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from serve.comm.tensor_parallel import TensorParallel
from serve.model.layers import Placement, Range, Shard, ShardedLayer


class ColumnParallelConv1D(ShardedLayer):
    """``ColumnParallelLinear`` with weight ``[in_features, out_features]``, always with a bias."""

    weight: nn.Parameter
    bias: nn.Parameter

    def __init__(self, in_features: int, columns: Range, place: Placement) -> None:
        weight = Shard((in_features, columns.total), columns.ranges, dim=1)
        bias = Shard((columns.total,), columns.ranges)
        super().__init__({"weight": weight, "bias": bias}, place)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``[num_tokens, in_features]`` to ``[num_tokens, local_out_features]``."""
        return torch.addmm(self.bias, x, self.weight)


class RowParallelConv1D(ShardedLayer):
    """``RowParallelLinear`` with weight ``[in_features, out_features]``, always with a bias."""

    weight: nn.Parameter
    bias: nn.Parameter

    def __init__(
        self, rows: Range, out_features: int, tp: TensorParallel, place: Placement
    ) -> None:
        weight = Shard((rows.total, out_features), rows.ranges)
        super().__init__({"weight": weight, "bias": Shard.whole(out_features)}, place)
        self.tp = tp

    def forward(self, x: Tensor) -> Tensor:
        """Map ``[num_tokens, local_in_features]`` to ``[num_tokens, out_features]``.

        The result is the same on all ranks.
        """
        if self.tp.size == 1:
            return torch.addmm(self.bias, x, self.weight)
        summand = self.tp.summand((len(x), self.weight.shape[1]), x.dtype)
        return self.tp.all_reduce(torch.mm(x, self.weight, out=summand)) + self.bias
