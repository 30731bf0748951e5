"""The Llama family: LLaMA 1 to 3, Mistral, SmolLM 2 and 3, and all that share their layers."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from serve.comm.tensor_parallel import TensorParallel
from serve.engine.forward_batch import AttentionMetadata, ForwardBatch
from serve.engine.kv_cache import KVCache
from serve.model.attention import Attention, torch_attention
from serve.model.config import ModelConfig
from serve.model.decoder import (
    Build,
    GatedMLP,
    Rotation,
    SelfAttention,
    Stack,
    build_of,
    cap_logits,
    make_head,
)
from serve.model.layers import RMSNorm, VocabParallelEmbedding


class LlamaLayer(nn.Module):
    """One layer: attention, then feed-forward, each on a normed copy and added."""

    def __init__(self, build: Build, layer: int) -> None:
        super().__init__()
        size, eps = build.config.hidden_size, build.config.norm_eps
        self.input_layernorm = RMSNorm(size, eps, build.place)
        self.self_attn = SelfAttention(build, layer)
        self.post_attention_layernorm = RMSNorm(size, eps, build.place)
        self.mlp = GatedMLP(build)

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


class LlamaModel(Stack):
    """From token ids to the last layer's hidden states."""

    def __init__(self, build: Build) -> None:
        super().__init__(build)
        config, place = build.config, build.place
        size, layers = config.hidden_size, range(config.num_layers)
        self.embed_tokens = VocabParallelEmbedding(config.vocab_size, size, build.tp, place)
        self.layers = nn.ModuleList(LlamaLayer(build, layer) for layer in layers)
        self.norm = RMSNorm(size, config.norm_eps, place)

    def forward(self, batch: ForwardBatch, kv_cache: KVCache) -> Tensor:
        """The states of the sampled tokens, ``[num_sampled, hidden]``."""
        residual = self.embed_tokens(batch.token_ids)
        return self.run(residual, self.layers, self.norm, batch, kv_cache)


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
        build = build_of(config, tp, dtype, device, attention)
        self.model = LlamaModel(build)
        self.lm_head = make_head(build, self.model.embed_tokens)
        self._logit_softcap = config.logit_softcap

    def forward(self, batch: ForwardBatch, kv_cache: KVCache) -> Tensor | None:
        """Logits ``[num_sampled, vocab_size]`` on the leader of ``tp``, else None."""
        return cap_logits(self.lm_head(self.model(batch, kv_cache)), self._logit_softcap)
