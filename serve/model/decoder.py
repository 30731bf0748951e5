"""The decoder that families share: attention with the KV cache, feed-forward, layers, LM head.

The residual stream is one tensor that each norm updates in place. A layer receives the output of
the sublayer before it, not yet added, and returns its own output, not yet added either. The next
norm adds it, because addition and norm are one kernel on a GPU.

Module paths equal checkpoint keys: ``model.layers.0.self_attn.q_proj`` below loads the tensor
``model.layers.0.self_attn.q_proj.weight``. Most families use the names of ``DecoderLayer``,
``Decoder`` and ``CausalLM``. A family with other names derives from ``AttentionLayer``, ``Layer``
and ``Stack`` and defines its own (see ``gpt2``).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from serve.kv.cache import KVCache
from serve.model.attention import Scoring
from serve.model.build import Build
from serve.model.forward_batch import AttentionMetadata, ForwardBatch
from serve.model.kernels import ops
from serve.model.kernels.head_norms import HeadNorms
from serve.model.layers import (
    ColumnParallelLinear,
    FusedLinear,
    ParallelLMHead,
    RMSNorm,
    RowParallelLinear,
    VocabParallelEmbedding,
)
from serve.model.rope import RotaryEmbedding

Rotation = tuple[Tensor, Tensor]  # cosine and sine, each [num_tokens, rotary_dim / 2], float32
Projection = Callable[[Tensor], Tensor]
Part = Callable[..., Tensor]
Parts = tuple[Part, Part, Part, Part]  # see Layer.parts


class AttentionLayer(nn.Module, ABC):
    """Attention of this rank's query heads. A family defines the projections under its own names.

    With ``config.qk_norm`` it has the norms ``q_norm`` and ``k_norm``.
    """

    q_norm: RMSNorm
    k_norm: RMSNorm

    def __init__(self, build: Build, layer: int, *, unit_offset: bool = False) -> None:
        """``unit_offset`` applies to the norms of queries and keys; see ``RMSNorm``."""
        super().__init__()
        config, window = build.config, build.config.window_of(layer)
        self._layer, self._attention = layer, build.attention
        self._scoring = Scoring(config.attention_scale, window, config.attention_softcap)
        self._has_norms = config.qk_norm
        if config.qk_norm:
            size, eps = config.head_dim, config.norm_eps
            self.q_norm = RMSNorm(size, eps, build.place, unit_offset=unit_offset)
            self.k_norm = RMSNorm(size, eps, build.place, unit_offset=unit_offset)

    @abstractmethod
    def projections(self) -> tuple[Projection, Projection]:
        """Return the input projection and the output projection.

        The first maps hidden states ``[num_tokens, hidden]`` to queries, keys and values side by
        side: ``[num_tokens, (num_heads + 2 * num_kv_heads) * head_dim]``. The second maps attention
        results ``[num_tokens, num_heads * head_dim]`` to ``[num_tokens, hidden]``, summed over
        ranks.
        """

    def forward(
        self, x: Tensor, rotation: Rotation, metadata: AttentionMetadata, kv_cache: KVCache
    ) -> Tensor:
        """Map ``[num_tokens, hidden]`` to the same shape; new keys and values go to the cache."""
        project_in, project_out = self.projections()
        # No local variable holds an intermediate, so that its memory is free for the next one.
        return project_out(self._attend(project_in(x), rotation, metadata, kv_cache))

    def _attend(
        self,
        qkv: Tensor,  # [num_tokens, (num_heads + 2 * num_kv_heads) * head_dim]
        rotation: Rotation,
        metadata: AttentionMetadata,
        kv_cache: KVCache,
    ) -> Tensor:
        k_cache, v_cache = kv_cache.layer(self._layer)
        slots, copies = metadata.slot_mapping, metadata.num_copies(self._scoring.window)
        # [copies * num_tokens, num_heads, head_dim]
        q = ops.rope_write(qkv, *rotation, k_cache, v_cache, slots, copies, self._norms())
        out = self._attention(q, k_cache, v_cache, metadata, self._scoring)
        return out.flatten(1)  # [num_tokens, num_heads * head_dim]

    def _norms(self) -> HeadNorms | None:
        if not self._has_norms:
            return None
        q_norm, k_norm = self.q_norm, self.k_norm
        return HeadNorms(q_norm.weight, k_norm.weight, q_norm.eps, q_norm.unit_offset)


class SelfAttention(AttentionLayer):
    """Attention with separate projections for queries, keys and values, run as one product."""

    def __init__(self, build: Build, layer: int, *, unit_offset: bool = False) -> None:
        super().__init__(build, layer, unit_offset=unit_offset)
        config, tp, place = build.config, build.tp, build.place
        bias, size, queries = config.attention_bias, config.hidden_size, build.queries
        self.q_proj = ColumnParallelLinear(size, queries, bias, place)
        self.k_proj = ColumnParallelLinear(size, build.keys, bias, place)
        self.v_proj = ColumnParallelLinear(size, build.keys, bias, place)
        self._qkv = FusedLinear(self.q_proj, self.k_proj, self.v_proj)
        self.o_proj = RowParallelLinear(queries, size, config.attention_output_bias, tp, place)

    def projections(self) -> tuple[Projection, Projection]:
        return self._qkv, self.o_proj


class GatedMLP(nn.Module):
    """The gated feed-forward layer: ``down(activation(gate(x)) * up(x))``."""

    def __init__(self, build: Build) -> None:
        super().__init__()
        config, place = build.config, build.place
        size, bias = config.hidden_size, config.mlp_bias
        self._activation = config.activation
        self.gate_proj = ColumnParallelLinear(size, build.inner, bias, place)
        self.up_proj = ColumnParallelLinear(size, build.inner, bias, place)
        self._gate_up = FusedLinear(self.gate_proj, self.up_proj)
        self.down_proj = RowParallelLinear(build.inner, size, bias, build.tp, place)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``[num_tokens, hidden]`` to the same shape."""
        # [num_tokens, 2 * inner], then [num_tokens, inner], then [num_tokens, hidden]. No local
        # variable holds an intermediate, because memory peaks here.
        out: Tensor = self.down_proj(ops.gate(self._gate_up(x), self._activation))
        return out


class Layer(nn.Module, ABC):
    """One decoder layer with norms before attention and before feed-forward.

    A family defines the modules under its own names and returns them from ``parts``.
    """

    @abstractmethod
    def parts(self) -> Parts:
        """Return the first norm, attention, the second norm and feed-forward, in this order."""

    def forward(
        self,
        x: Tensor | None,
        residual: Tensor,
        rotation: Rotation,
        metadata: AttentionMetadata,
        kv_cache: KVCache,
    ) -> Tensor | None:
        """Add ``x`` to ``residual`` in place and return what this layer adds to it next.

        ``x`` is the output of the layer before (None in the first layer). ``x``, ``residual`` and
        the result are ``[num_tokens, hidden]``. None means that nothing is left to add.
        """
        first_norm, attention, second_norm, feed_forward = self.parts()
        # ``x`` is reassigned on purpose: it frees each intermediate before the feed-forward layer,
        # where memory peaks.
        x = first_norm(x, residual)
        x = attention(x, rotation, metadata, kv_cache)
        x = second_norm(x, residual)
        return feed_forward(x)


class DecoderLayer(Layer):
    """A layer with the module names that most families use."""

    def __init__(self, build: Build, attention: nn.Module, mlp: nn.Module) -> None:
        super().__init__()
        size, eps = build.config.hidden_size, build.config.norm_eps
        self.input_layernorm = RMSNorm(size, eps, build.place)
        self.self_attn = attention
        self.post_attention_layernorm = RMSNorm(size, eps, build.place)
        self.mlp = mlp

    def parts(self) -> Parts:
        return self.input_layernorm, self.self_attn, self.post_attention_layernorm, self.mlp


class Stack(nn.Module):
    """A stack of layers over one residual stream, with the rotation of each layer."""

    def __init__(self, build: Build) -> None:
        super().__init__()
        config = build.config
        self._ropes = [config.rope_of(layer) for layer in range(config.num_layers)]
        device, dim = build.place.device, config.head_dim
        # Layers with the same rotation share its cosines and sines.
        self._rotary = {rope: RotaryEmbedding(rope, dim, device) for rope in set(self._ropes)}

    def run(
        self,
        residual: Tensor,  # [num_tokens, hidden], overwritten
        layers: Iterable[nn.Module],
        norm: nn.Module,
        batch: ForwardBatch,
        kv_cache: KVCache,
    ) -> Tensor:
        """Run ``layers`` and the final ``norm``; return states ``[num_sampled, hidden]``."""
        rotations = {rope: rotary(batch.positions) for rope, rotary in self._rotary.items()}
        x: Tensor | None = None  # [num_tokens, hidden]
        for rope, layer in zip(self._ropes, layers, strict=True):
            x = layer(x, residual, rotations[rope], batch.attention, kv_cache)
        if batch.sample_indices is not None:  # only sampled tokens need logits
            x = None if x is None else x[batch.sample_indices]
            residual = residual[batch.sample_indices]
        states: Tensor = norm(x, residual)  # [num_sampled, hidden]
        return states


class Decoder(Stack):
    """Token ids to final hidden states, with the module names that most families use."""

    def __init__(self, build: Build, layers: Iterable[nn.Module], norm: RMSNorm) -> None:
        super().__init__(build)
        config, place = build.config, build.place
        size = config.hidden_size
        self.embed_tokens = VocabParallelEmbedding(config.vocab_size, size, build.tp, place)
        self.layers = nn.ModuleList(layers)
        self.norm = norm
        # Rounded to the activations' type first, as the families' own code does.
        self._scale = torch.tensor(config.embedding_scale, dtype=place.dtype).item()

    def forward(self, batch: ForwardBatch, kv_cache: KVCache) -> Tensor:
        """Return the final states of the sampled tokens, ``[num_sampled, hidden]``."""
        residual = self.embed_tokens(batch.token_ids)  # [num_tokens, hidden]
        if self._scale != 1.0:
            residual = residual * self._scale
        return self.run(residual, self.layers, self.norm, batch, kv_cache)


class CausalLM(nn.Module, ABC):
    """A language model with the module names that most families use.

    A family defines ``make_layer``, and ``make_norm`` if its norms differ. Parameters are
    uninitialised until ``load_weights`` fills them.
    """

    base_prefix = "model"  # checkpoints of the bare model lack this prefix in their keys

    def __init__(self, build: Build) -> None:
        super().__init__()
        layers = (self.make_layer(build, layer) for layer in range(build.config.num_layers))
        self.model = Decoder(build, layers, self.make_norm(build))
        self.lm_head = make_head(build, self.model.embed_tokens)
        self._logit_softcap = build.config.logit_softcap

    @abstractmethod
    def make_layer(self, build: Build, layer: int) -> nn.Module:
        """Make layer number ``layer``; its ``forward`` takes the arguments of ``Layer.forward``."""

    def make_norm(self, build: Build) -> RMSNorm:
        """Make the norm after the last layer."""
        return RMSNorm(build.config.hidden_size, build.config.norm_eps, build.place)

    def forward(self, batch: ForwardBatch, kv_cache: KVCache) -> Tensor | None:
        """Return logits ``[num_sampled, vocab_size]`` on the leader of ``tp``, None elsewhere."""
        logits: Tensor | None = self.lm_head(self.model(batch, kv_cache))
        if logits is not None and self._logit_softcap is not None:
            logits = logits.div_(self._logit_softcap).tanh_().mul_(self._logit_softcap)
        return logits


def make_head(build: Build, embedding: VocabParallelEmbedding) -> ParallelLMHead:
    """Make the LM head; it shares the weights of ``embedding`` if the config ties them."""
    config = build.config
    size = config.embedding_size or config.hidden_size
    head = ParallelLMHead(config.vocab_size, size, build.tp, build.place)
    if config.tie_word_embeddings:
        head.weight = embedding.weight
    return head
