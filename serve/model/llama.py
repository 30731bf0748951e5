"""The Llama family: LLaMA 1 to 3, Mistral, SmolLM2 and all that share their layers."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from serve.comm.tensor_parallel import TensorParallel
from serve.engine.forward_batch import AttentionMetadata, ForwardBatch
from serve.engine.kv_cache import KVCache
from serve.engine.kv_layout import shard_kv_heads
from serve.model import ops
from serve.model.attention import Attention, torch_attention
from serve.model.config import ModelConfig
from serve.model.layers import (
    ColumnParallelLinear,
    FusedLinear,
    ParallelLMHead,
    Placement,
    Range,
    RMSNorm,
    RowParallelLinear,
    VocabParallelEmbedding,
)
from serve.model.rope import RotaryEmbedding

Rotation = tuple[Tensor, Tensor]  # cosine and sine, each [num_tokens, head_dim / 2]


class LlamaAttention(nn.Module):
    """Self-attention of the query heads of this rank, and of the KV heads that they read."""

    def __init__(
        self,
        config: ModelConfig,
        layer: int,
        tp: TensorParallel,
        place: Placement,
        attention: Attention,
    ) -> None:
        super().__init__()
        self.layer, self.attention = layer, attention
        kv_heads = shard_kv_heads(config.num_heads, config.num_kv_heads, tp.size, tp.rank)
        queries = Range.even(config.num_heads * config.head_dim, tp)
        keys = Range.heads(config.num_kv_heads, config.head_dim, kv_heads)
        bias, size = config.attention_bias, config.hidden_size
        self.q_proj = ColumnParallelLinear(size, queries, bias, place)
        self.k_proj = ColumnParallelLinear(size, keys, bias, place)
        self.v_proj = ColumnParallelLinear(size, keys, bias, place)
        self.qkv = FusedLinear(self.q_proj, self.k_proj, self.v_proj)
        self.o_proj = RowParallelLinear(queries, size, config.attention_output_bias, tp, place)

    def forward(
        self, x: Tensor, rotation: Rotation, metadata: AttentionMetadata, kv_cache: KVCache
    ) -> Tensor:
        """``[num_tokens, hidden]`` to the same; the new keys and values go into the cache."""
        caches = kv_cache.layer(self.layer)
        slots, num_copies = metadata.slot_mapping, metadata.num_query_copies
        q = ops.rope_write(self.qkv(x), *rotation, *caches, slots, num_copies)
        out = self.attention(q, *caches, metadata)  # [num_tokens, num_heads, head_dim]
        projected: Tensor = self.o_proj(out.flatten(1))
        return projected


class LlamaMLP(nn.Module):
    """The gated feed-forward layer."""

    def __init__(self, config: ModelConfig, tp: TensorParallel, place: Placement) -> None:
        super().__init__()
        inner = Range.even(config.intermediate_size, tp)
        size, bias = config.hidden_size, config.mlp_bias
        self.gate_proj = ColumnParallelLinear(size, inner, bias, place)
        self.up_proj = ColumnParallelLinear(size, inner, bias, place)
        self.gate_up = FusedLinear(self.gate_proj, self.up_proj)
        self.down_proj = RowParallelLinear(inner, size, bias, tp, place)

    def forward(self, x: Tensor) -> Tensor:
        """``[num_tokens, hidden]`` to the same."""
        out: Tensor = self.down_proj(ops.silu_mul(self.gate_up(x)))
        return out


class LlamaLayer(nn.Module):
    """One layer: attention, then feed-forward, each on a normed copy and added."""

    def __init__(
        self,
        config: ModelConfig,
        layer: int,
        tp: TensorParallel,
        place: Placement,
        attention: Attention,
    ) -> None:
        super().__init__()
        size, eps = config.hidden_size, config.rms_norm_eps
        self.input_layernorm = RMSNorm(size, eps, place)
        self.self_attn = LlamaAttention(config, layer, tp, place, attention)
        self.post_attention_layernorm = RMSNorm(size, eps, place)
        self.mlp = LlamaMLP(config, tp, place)

    def forward(
        self,
        x: Tensor | None,
        residual: Tensor,
        rotation: Rotation,
        metadata: AttentionMetadata,
        kv_cache: KVCache,
    ) -> Tensor:
        """What this layer adds to ``residual``, where ``x`` of the layer before is added first.

        All ``[num_tokens, hidden]``.
        """
        x = self.input_layernorm(x, residual)
        x = self.self_attn(x, rotation, metadata, kv_cache)
        x = self.post_attention_layernorm(x, residual)
        out: Tensor = self.mlp(x)
        return out


class LlamaModel(nn.Module):
    """From token ids to the last layer's hidden states."""

    def __init__(
        self, config: ModelConfig, tp: TensorParallel, place: Placement, attention: Attention
    ) -> None:
        super().__init__()
        size = config.hidden_size
        self.embed_tokens = VocabParallelEmbedding(config.vocab_size, size, tp, place)
        self.layers = nn.ModuleList(
            LlamaLayer(config, layer, tp, place, attention) for layer in range(config.num_layers)
        )
        self.norm = RMSNorm(size, config.rms_norm_eps, place)
        self.rotary_emb = RotaryEmbedding(config.rope, config.head_dim, place.device)

    def forward(self, batch: ForwardBatch, kv_cache: KVCache) -> Tensor:
        """The states of the sampled tokens, ``[num_sampled, hidden]``."""
        residual = self.embed_tokens(batch.token_ids)  # [num_tokens, hidden]
        rotation = self.rotary_emb(batch.positions)
        x: Tensor | None = None
        for layer in self.layers:
            x = layer(x, residual, rotation, batch.attention, kv_cache)
        assert x is not None
        if batch.sample_indices is not None:
            x, residual = x[batch.sample_indices], residual[batch.sample_indices]
        states: Tensor = self.norm(x, residual)
        return states


class LlamaForCausalLM(nn.Module):
    """The language model. Parameters are uninitialised until weights are loaded."""

    def __init__(
        self,
        config: ModelConfig,
        tp: TensorParallel,
        dtype: torch.dtype,
        device: torch.device | str,
        attention: Attention = torch_attention,
    ) -> None:
        super().__init__()
        place = Placement(dtype, torch.device(device))
        self.model = LlamaModel(config, tp, place, attention)
        self.lm_head = ParallelLMHead(config.vocab_size, config.hidden_size, tp, place)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight

    def forward(self, batch: ForwardBatch, kv_cache: KVCache) -> Tensor | None:
        """Logits ``[num_sampled, vocab_size]`` on the leader of ``tp``, else None."""
        logits: Tensor | None = self.lm_head(self.model(batch, kv_cache))
        return logits
