"""The Llama family: LLaMA 1 to 3, Mistral, SmolLM2 and all that share their layers."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from serve.comm.tensor_parallel import TensorParallel
from serve.engine.forward_batch import AttentionMetadata, ForwardBatch
from serve.engine.kv_cache import KVCache
from serve.engine.kv_layout import shard_kv_heads
from serve.model.attention import Attention, torch_attention
from serve.model.config import ModelConfig
from serve.model.layers import (
    ColumnParallelLinear,
    ParallelLMHead,
    Placement,
    Range,
    RMSNorm,
    RowParallelLinear,
    VocabParallelEmbedding,
)
from serve.model.rope import RotaryEmbedding, rotate

Rotation = tuple[Tensor, Tensor]  # cosine and sine, each [num_tokens, 1, head_dim]


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
        self.layer, self.head_dim, self.attention = layer, config.head_dim, attention
        kv_heads = shard_kv_heads(config.num_heads, config.num_kv_heads, tp.size, tp.rank)
        queries = Range.even(config.num_heads * config.head_dim, tp)
        keys = Range.heads(config.num_kv_heads, config.head_dim, kv_heads)
        bias, size = config.attention_bias, config.hidden_size
        self.q_proj = ColumnParallelLinear(size, queries, bias, place)
        self.k_proj = ColumnParallelLinear(size, keys, bias, place)
        self.v_proj = ColumnParallelLinear(size, keys, bias, place)
        self.o_proj = RowParallelLinear(queries, size, config.attention_output_bias, tp, place)

    def forward(
        self, x: Tensor, rotation: Rotation, metadata: AttentionMetadata, kv_cache: KVCache
    ) -> Tensor:
        """``[num_tokens, hidden]`` to the same; the new keys and values go into the cache."""
        heads = (len(x), -1, self.head_dim)
        q = rotate(self.q_proj(x).view(heads), *rotation)
        k = rotate(self.k_proj(x).view(heads), *rotation)
        v = self.v_proj(x).view(heads)  # [num_tokens, num_kv_heads, head_dim]
        kv_cache.write(self.layer, k, v, metadata.slot_mapping)
        out = self.attention(q, *kv_cache.layer(self.layer), metadata)
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
        self.down_proj = RowParallelLinear(inner, size, bias, tp, place)

    def forward(self, x: Tensor) -> Tensor:
        """``[num_tokens, hidden]`` to the same."""
        out: Tensor = self.down_proj(functional.silu(self.gate_proj(x)) * self.up_proj(x))
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
        self, x: Tensor, rotation: Rotation, metadata: AttentionMetadata, kv_cache: KVCache
    ) -> Tensor:
        """``[num_tokens, hidden]`` to the same."""
        x = x + self.self_attn(self.input_layernorm(x), rotation, metadata, kv_cache)
        out: Tensor = x + self.mlp(self.post_attention_layernorm(x))
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
        x = self.embed_tokens(batch.token_ids)  # [num_tokens, hidden]
        rotation = self.rotary_emb(batch.positions, x.dtype)
        for layer in self.layers:
            x = layer(x, rotation, batch.attention, kv_cache)
        states: Tensor = self.norm(x[batch.sample_indices])
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
        """Float32 logits ``[num_sampled, vocab_size]`` on the leader of ``tp``, else None."""
        logits: Tensor | None = self.lm_head(self.model(batch, kv_cache))
        return logits
