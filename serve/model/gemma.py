"""Gemma 2 and 3 (text): norms before and after each part, whose weights count from one."""

from __future__ import annotations

from torch import Tensor, nn

from serve.kv.cache import KVCache
from serve.model.decoder import (
    Build,
    CausalLM,
    GatedMLP,
    Layer,
    Parts,
    Rotation,
    SelfAttention,
)
from serve.model.forward_batch import AttentionMetadata
from serve.model.layers import RMSNorm


class GemmaLayer(Layer):
    """One layer: attention and feed-forward are normed before and after."""

    def __init__(self, build: Build, layer: int) -> None:
        super().__init__()
        self.input_layernorm = make_norm(build)
        self.self_attn = SelfAttention(build, layer, around_one=True)
        self.post_attention_layernorm = make_norm(build)
        self.pre_feedforward_layernorm = make_norm(build)
        self.mlp = GatedMLP(build)
        self.post_feedforward_layernorm = make_norm(build)

    def parts(self) -> Parts:
        """See ``Layer``."""
        first_norm, second_norm = self.input_layernorm, self.pre_feedforward_layernorm
        return first_norm, self._attend, second_norm, self._feed_forward

    def _attend(
        self, x: Tensor, rotation: Rotation, metadata: AttentionMetadata, kv_cache: KVCache
    ) -> Tensor:
        x = self.self_attn(x, rotation, metadata, kv_cache)
        out: Tensor = self.post_attention_layernorm(None, x)
        return out

    def _feed_forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.post_feedforward_layernorm(None, self.mlp(x))
        return out


class GemmaForCausalLM(CausalLM):
    """The language model."""

    def make_layer(self, build: Build, layer: int) -> nn.Module:
        """See ``CausalLM``."""
        return GemmaLayer(build, layer)

    def make_norm(self, build: Build) -> RMSNorm:
        """See ``CausalLM``."""
        return make_norm(build)


def make_norm(build: Build) -> RMSNorm:
    """A norm as all of Gemma's are."""
    config = build.config
    return RMSNorm(config.hidden_size, config.norm_eps, build.place, around_one=True)
