"""Phi-3 and Phi-4: Llama's layers with fewer, larger projections; part of a head may be rotated."""

from __future__ import annotations

from torch import Tensor, nn

from serve.model.decoder import AttentionLayer, Build, CausalLM, DecoderLayer, Projection
from serve.model.kernels import ops
from serve.model.layers import ColumnParallelLinear, RowParallelLinear


class Phi3Attention(AttentionLayer):
    """Queries, keys and values are one projection."""

    def __init__(self, build: Build, layer: int) -> None:
        super().__init__(build, layer)
        size, place = build.config.hidden_size, build.place
        self.qkv_proj = ColumnParallelLinear(size, build.qkv, False, place)
        self.o_proj = RowParallelLinear(build.queries, size, False, build.tp, place)

    def projections(self) -> tuple[Projection, Projection]:
        """See ``AttentionLayer``."""
        return self.qkv_proj, self.o_proj


class Phi3MLP(nn.Module):
    """Gate and up are one projection."""

    def __init__(self, build: Build) -> None:
        super().__init__()
        size, inner, place = build.config.hidden_size, build.inner, build.place
        self._activation = build.config.activation
        self.gate_up_proj = ColumnParallelLinear(size, inner.and_then(inner), False, place)
        self.down_proj = RowParallelLinear(inner, size, False, build.tp, place)

    def forward(self, x: Tensor) -> Tensor:
        """``[num_tokens, hidden]`` to the same."""
        out: Tensor = self.down_proj(ops.gate(self.gate_up_proj(x), self._activation))
        return out


class Phi3ForCausalLM(CausalLM):
    """The language model."""

    def make_layer(self, build: Build, layer: int) -> nn.Module:
        """See ``CausalLM``."""
        return DecoderLayer(build, Phi3Attention(build, layer), Phi3MLP(build))
