"""InternLM2 and 2.5: Llama's layers under other names; queries, keys and values interleaved."""

from __future__ import annotations

from torch import Tensor, nn

from serve.kv.cache import KVCache
from serve.model.build import Build
from serve.model.decoder import AttentionLayer, Layer, Parts, Projection, Stack, make_head
from serve.model.forward_batch import ForwardBatch
from serve.model.kernels import ops
from serve.model.layers import (
    ColumnParallelLinear,
    FusedLinear,
    Range,
    RMSNorm,
    RowParallelLinear,
    VocabParallelEmbedding,
)


def interleaved_qkv(build: Build) -> Range:
    """Return this rank's rows of ``wqkv``: its queries, then its keys, then its values.

    The checkpoint groups the rows by KV head: its query heads, then its key, then its value.
    """
    config, tp = build.config, build.tp
    group = config.num_heads // config.num_kv_heads  # query heads per KV head
    per_rank = config.num_heads // tp.size
    queries = range(tp.rank * per_rank, (tp.rank + 1) * per_rank)
    stored = [head // group * (group + 2) + head % group for head in queries]
    stored += [head * (group + 2) + group for head in build.kv_heads]
    stored += [head * (group + 2) + group + 1 for head in build.kv_heads]
    num_heads = config.num_kv_heads * (group + 2)
    return Range.heads(num_heads, config.head_dim, tuple(stored))


class InternLM2Attention(AttentionLayer):
    """Attention whose queries, keys and values are one checkpoint tensor, interleaved."""

    def __init__(self, build: Build, layer: int) -> None:
        super().__init__(build, layer)
        config, place = build.config, build.place
        size, bias = config.hidden_size, config.attention_bias
        self.wqkv = ColumnParallelLinear(size, interleaved_qkv(build), bias, place)
        self.wo = RowParallelLinear(build.queries, size, bias, build.tp, place)

    def projections(self) -> tuple[Projection, Projection]:
        return self.wqkv, self.wo


class InternLM2MLP(nn.Module):
    """The gated feed-forward layer: ``w1`` is the gate, ``w3`` up and ``w2`` down."""

    def __init__(self, build: Build) -> None:
        super().__init__()
        size, inner, place = build.config.hidden_size, build.inner, build.place
        self._activation = build.config.activation
        self.w1 = ColumnParallelLinear(size, inner, False, place)
        self.w3 = ColumnParallelLinear(size, inner, False, place)
        self._gate_up = FusedLinear(self.w1, self.w3)
        self.w2 = RowParallelLinear(inner, size, False, build.tp, place)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``[num_tokens, hidden]`` to the same shape."""
        out: Tensor = self.w2(ops.gate(self._gate_up(x), self._activation))
        return out


class InternLM2Layer(Layer):
    """One decoder layer."""

    def __init__(self, build: Build, layer: int) -> None:
        super().__init__()
        size, eps = build.config.hidden_size, build.config.norm_eps
        self.attention_norm = RMSNorm(size, eps, build.place)
        self.attention = InternLM2Attention(build, layer)
        self.ffn_norm = RMSNorm(size, eps, build.place)
        self.feed_forward = InternLM2MLP(build)

    def parts(self) -> Parts:
        return self.attention_norm, self.attention, self.ffn_norm, self.feed_forward


class InternLM2Model(Stack):
    """Token ids to final hidden states."""

    def __init__(self, build: Build) -> None:
        super().__init__(build)
        config, place = build.config, build.place
        size, layers = config.hidden_size, range(config.num_layers)
        self.tok_embeddings = VocabParallelEmbedding(config.vocab_size, size, build.tp, place)
        self.layers = nn.ModuleList(InternLM2Layer(build, layer) for layer in layers)
        self.norm = RMSNorm(size, config.norm_eps, place)

    def forward(self, batch: ForwardBatch, kv_cache: KVCache) -> Tensor:
        """Return the final states of the sampled tokens, ``[num_sampled, hidden]``."""
        residual = self.tok_embeddings(batch.token_ids)  # [num_tokens, hidden]
        return self.run(residual, self.layers, self.norm, batch, kv_cache)


class InternLM2ForCausalLM(nn.Module):
    """InternLM2 and 2.5."""

    base_prefix = "model"  # checkpoints of the bare model lack this prefix in their keys

    def __init__(self, build: Build) -> None:
        super().__init__()
        self.model = InternLM2Model(build)
        self.output = make_head(build, self.model.tok_embeddings)

    def forward(self, batch: ForwardBatch, kv_cache: KVCache) -> Tensor | None:
        """Return logits ``[num_sampled, vocab_size]`` on the leader of ``tp``, None elsewhere."""
        logits: Tensor | None = self.output(self.model(batch, kv_cache))
        return logits
