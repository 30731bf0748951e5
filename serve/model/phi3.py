"""Phi-3 and Phi-4: Llama's layers with fused projections; part of a head may be rotated."""

from __future__ import annotations

from torch import Tensor, nn

from serve.model.build import Build
from serve.model.decoder import AttentionLayer, CausalLM, DecoderLayer, Projection
from serve.model.kernels import ops
from serve.model.layers import ColumnParallelLinear, RowParallelLinear


class Phi3Attention(AttentionLayer):
    """Attention whose queries, keys and values are one checkpoint tensor."""

    def __init__(self, build: Build, layer: int) -> None:
        super().__init__(build, layer)
        size, place = build.config.hidden_size, build.place
        self.qkv_proj = ColumnParallelLinear(size, build.qkv, False, place)
        self.o_proj = RowParallelLinear(build.queries, size, False, build.tp, place)

    def projections(self) -> tuple[Projection, Projection]:
        return self.qkv_proj, self.o_proj


class Phi3MLP(nn.Module):
    """The gated feed-forward layer; gate and up are one checkpoint tensor."""

    def __init__(self, build: Build) -> None:
        super().__init__()
        size, inner, place = build.config.hidden_size, build.inner, build.place
        self._activation = build.config.activation
        self.gate_up_proj = ColumnParallelLinear(size, inner.and_then(inner), False, place)
        self.down_proj = RowParallelLinear(inner, size, False, build.tp, place)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``[num_tokens, hidden]`` to the same shape."""
        out: Tensor = self.down_proj(ops.gate(self.gate_up_proj(x), self._activation))
        return out


class Phi3ForCausalLM(CausalLM):
    """Phi-3 and Phi-4."""

    def make_layer(self, build: Build, layer: int) -> nn.Module:
        return DecoderLayer(build, Phi3Attention(build, layer), Phi3MLP(build))
