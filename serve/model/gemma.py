"""Gemma 2 and 3 (text): norms before and after each sublayer, which scale by ``1 + weight``."""

from __future__ import annotations

from torch import Tensor, nn

from serve.kv.cache import KVCache
from serve.model.build import Build
from serve.model.decoder import CausalLM, GatedMLP, Layer, Parts, Rotation, SelfAttention
from serve.model.forward_batch import AttentionMetadata
from serve.model.layers import RMSNorm


class GemmaLayer(Layer):
    """One decoder layer: attention and feed-forward each have a norm before and a norm after."""

    def __init__(self, build: Build, layer: int) -> None:
        super().__init__()
        self.input_layernorm = make_norm(build)
        self.self_attn = SelfAttention(build, layer, unit_offset=True)
        self.post_attention_layernorm = make_norm(build)
        self.pre_feedforward_layernorm = make_norm(build)
        self.mlp = GatedMLP(build)
        self.post_feedforward_layernorm = make_norm(build)

    def parts(self) -> Parts:
        first_norm, second_norm = self.input_layernorm, self.pre_feedforward_layernorm
        return first_norm, self._attend, second_norm, self._feed_forward

    def _attend(
        self, x: Tensor, rotation: Rotation, metadata: AttentionMetadata, kv_cache: KVCache
    ) -> Tensor:
        x = self.self_attn(x, rotation, metadata, kv_cache)  # [num_tokens, hidden]
        out: Tensor = self.post_attention_layernorm(None, x)
        return out

    def _feed_forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.post_feedforward_layernorm(None, self.mlp(x))
        return out


class GemmaForCausalLM(CausalLM):
    """Gemma 2 and 3."""

    def make_layer(self, build: Build, layer: int) -> nn.Module:
        return GemmaLayer(build, layer)

    def make_norm(self, build: Build) -> RMSNorm:
        return make_norm(build)


def make_norm(build: Build) -> RMSNorm:
    config = build.config
    return RMSNorm(config.hidden_size, config.norm_eps, build.place, unit_offset=True)
