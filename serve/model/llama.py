"""Llama and the families whose layers differ from it by configuration alone.

LLaMA 1 to 3; Mistral (sliding window); SmolLM 2 and 3 (some layers are not rotated); Qwen 2 and 2.5
(biases of q, k and v); Qwen 3 (norms of queries and keys). ``serve.model_config.families`` reads
these differences from config.json.

The modules and their checkpoint keys::

    model.embed_tokens                            [vocab_size, hidden]
    model.layers.N.input_layernorm                [hidden]
    model.layers.N.self_attn.q_proj               [num_heads * head_dim, hidden]
    model.layers.N.self_attn.k_proj, .v_proj      [num_kv_heads * head_dim, hidden]
    model.layers.N.self_attn.q_norm, .k_norm      [head_dim], in Qwen 3
    model.layers.N.self_attn.o_proj               [hidden, num_heads * head_dim]
    model.layers.N.post_attention_layernorm       [hidden]
    model.layers.N.mlp.gate_proj, .up_proj        [intermediate, hidden]
    model.layers.N.mlp.down_proj                  [hidden, intermediate]
    model.norm                                    [hidden]
    lm_head                                       [vocab_size, hidden], or tied to embed_tokens
"""

from __future__ import annotations

from torch import nn

from serve.model.build import Build
from serve.model.decoder import CausalLM, DecoderLayer, GatedMLP, SelfAttention


class LlamaForCausalLM(CausalLM):
    """Llama: ``SelfAttention`` and ``GatedMLP`` in every layer."""

    def make_layer(self, build: Build, layer: int) -> nn.Module:
        return DecoderLayer(build, SelfAttention(build, layer), GatedMLP(build))
