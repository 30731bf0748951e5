"""GPT-2: learned positions, LayerNorm, GELU, and weights stored transposed.

An example of a family whose checkpoint keys are not the usual ones: it defines every module itself.
"""

from __future__ import annotations

from torch import Tensor, nn

from serve.kv.cache import KVCache
from serve.model.build import Build
from serve.model.conv1d import ColumnParallelConv1D, RowParallelConv1D
from serve.model.decoder import AttentionLayer, Layer, Parts, Projection, Stack, make_head
from serve.model.forward_batch import ForwardBatch
from serve.model.kernels import ops
from serve.model.layers import LayerNorm, PositionEmbedding, VocabParallelEmbedding


class GPT2Attention(AttentionLayer):
    """Attention whose queries, keys and values are one checkpoint tensor."""

    def __init__(self, build: Build, layer: int) -> None:
        super().__init__(build, layer)
        size, place = build.config.hidden_size, build.place
        self.c_attn = ColumnParallelConv1D(size, build.qkv, place)
        self.c_proj = RowParallelConv1D(build.queries, size, build.tp, place)

    def projections(self) -> tuple[Projection, Projection]:
        return self.c_attn, self.c_proj


class GPT2MLP(nn.Module):
    """The feed-forward layer, without a gate."""

    def __init__(self, build: Build) -> None:
        super().__init__()
        size, place = build.config.hidden_size, build.place
        self._activation = build.config.activation
        self.c_fc = ColumnParallelConv1D(size, build.inner, place)
        self.c_proj = RowParallelConv1D(build.inner, size, build.tp, place)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``[num_tokens, hidden]`` to the same shape."""
        out: Tensor = self.c_proj(ops.activate(self.c_fc(x), self._activation))
        return out


class GPT2Layer(Layer):
    """One decoder layer."""

    def __init__(self, build: Build, layer: int) -> None:
        super().__init__()
        size, eps = build.config.hidden_size, build.config.norm_eps
        self.ln_1 = LayerNorm(size, eps, build.place)
        self.attn = GPT2Attention(build, layer)
        self.ln_2 = LayerNorm(size, eps, build.place)
        self.mlp = GPT2MLP(build)

    def parts(self) -> Parts:
        return self.ln_1, self.attn, self.ln_2, self.mlp


class GPT2Model(Stack):
    """Token ids to final hidden states."""

    def __init__(self, build: Build) -> None:
        super().__init__(build)
        config, place = build.config, build.place
        size, positions = config.hidden_size, config.max_position_embeddings
        self.wte = VocabParallelEmbedding(config.vocab_size, size, build.tp, place)
        self.wpe = PositionEmbedding(positions, size, 0, place)
        self.h = nn.ModuleList(GPT2Layer(build, layer) for layer in range(config.num_layers))
        self.ln_f = LayerNorm(size, config.norm_eps, place)

    def forward(self, batch: ForwardBatch, kv_cache: KVCache) -> Tensor:
        """Return the final states of the sampled tokens, ``[num_sampled, hidden]``."""
        # [num_tokens, hidden]
        residual = self.wte(batch.token_ids) + self.wpe(batch.positions)
        return self.run(residual, self.h, self.ln_f, batch, kv_cache)


class GPT2LMHeadModel(nn.Module):
    """GPT-2."""

    base_prefix = "transformer"  # checkpoints of the bare model lack this prefix in their keys

    def __init__(self, build: Build) -> None:
        super().__init__()
        self.transformer = GPT2Model(build)
        self.lm_head = make_head(build, self.transformer.wte)

    def forward(self, batch: ForwardBatch, kv_cache: KVCache) -> Tensor | None:
        """Return logits ``[num_sampled, vocab_size]`` on the leader of ``tp``, None elsewhere."""
        logits: Tensor | None = self.lm_head(self.transformer(batch, kv_cache))
        return logits
