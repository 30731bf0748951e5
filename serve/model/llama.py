"""The Llama family and those that share its layers, which their configuration tells apart.

LLaMA 1 to 3, Mistral (a window), SmolLM 2 and 3 (layers that do not rotate), Qwen 2 and 2.5 (biases
of queries, keys and values), Qwen 3 (norms of queries and keys).
"""

from __future__ import annotations

from torch import nn

from serve.model.decoder import Build, CausalLM, DecoderLayer, GatedMLP, SelfAttention


class LlamaForCausalLM(CausalLM):
    """The language model."""

    def make_layer(self, build: Build, layer: int) -> nn.Module:
        """See ``CausalLM``."""
        return DecoderLayer(build, SelfAttention(build, layer), GatedMLP(build))
