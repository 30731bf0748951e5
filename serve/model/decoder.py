"""What the families' decoders share: attention around the cache, feed-forward, stack and head.

A layer is given what the layer before adds to the residual stream, and returns what it adds itself:
each addition is made by the norm that follows, in one kernel with it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from serve.comm.tensor_parallel import TensorParallel
from serve.kv.cache import KVCache
from serve.model.attention import Attention, Scoring
from serve.model.forward_batch import AttentionMetadata, ForwardBatch
from serve.model.kernels import ops
from serve.model.kernels.head_norms import HeadNorms
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
from serve.model_config.config import ModelConfig
from serve.model_config.kv_layout import shard_kv_heads

Rotation = tuple[Tensor, Tensor]  # cosine and sine, each [num_tokens, rotary_dim / 2]
Projection = Callable[[Tensor], Tensor]
Part = Callable[..., Tensor]
Parts = tuple[Part, Part, Part, Part]  # see Layer


@dataclass(frozen=True, slots=True)
class Build:
    """What the layers of one model are made from."""

    config: ModelConfig
    tp: TensorParallel
    place: Placement
    attention: Attention

    @property
    def queries(self) -> Range:
        """The rows of this rank's query heads."""
        return Range.even(self.config.num_heads * self.config.head_dim, self.tp)

    @property
    def kv_heads(self) -> tuple[int, ...]:
        """The KV heads that they read."""
        config, tp = self.config, self.tp
        return shard_kv_heads(config.num_heads, config.num_kv_heads, tp.size, tp.rank)

    @property
    def keys(self) -> Range:
        """The rows of those."""
        return Range.heads(self.config.num_kv_heads, self.config.head_dim, self.kv_heads)

    @property
    def qkv(self) -> Range:
        """Queries, keys and values where a checkpoint has them as one, in this order."""
        return self.queries.and_then(self.keys, self.keys)

    @property
    def inner(self) -> Range:
        """This rank's share of the feed-forward layer."""
        return Range.even(self.config.intermediate_size, self.tp)


class AttentionLayer(nn.Module, ABC):
    """Attention of the query heads of this rank; the family names its projections."""

    q_norm: RMSNorm
    k_norm: RMSNorm

    def __init__(self, build: Build, layer: int, *, around_one: bool = False) -> None:
        """``around_one``: see ``RMSNorm``, for the norms of queries and keys if there are any."""
        super().__init__()
        config, window = build.config, build.config.window_of(layer)
        self._layer, self._attention = layer, build.attention
        self._scoring = Scoring(config.attention_scale, window, config.attention_softcap)
        self._has_norms = config.qk_norm
        if config.qk_norm:
            size, eps = config.head_dim, config.norm_eps
            self.q_norm = RMSNorm(size, eps, build.place, around_one=around_one)
            self.k_norm = RMSNorm(size, eps, build.place, around_one=around_one)

    @abstractmethod
    def projections(self) -> tuple[Projection, Projection]:
        """To queries, keys and values side by side, and from the heads' results."""

    def forward(
        self, x: Tensor, rotation: Rotation, metadata: AttentionMetadata, kv_cache: KVCache
    ) -> Tensor:
        """``[num_tokens, hidden]`` to the same."""
        project_in, project_out = self.projections()
        return project_out(self._attend(project_in(x), rotation, metadata, kv_cache))

    def _attend(
        self, qkv: Tensor, rotation: Rotation, metadata: AttentionMetadata, kv_cache: KVCache
    ) -> Tensor:
        """Projections side by side (see ``ops.rope_write``) to ``[num_tokens, heads * head_dim]``.

        The new keys and values go into the cache.
        """
        k_cache, v_cache = kv_cache.layer(self._layer)
        slots, copies = metadata.slot_mapping, metadata.num_copies(self._scoring.window)
        q = ops.rope_write(qkv, *rotation, k_cache, v_cache, slots, copies, self._norms())
        return self._attention(q, k_cache, v_cache, metadata, self._scoring).flatten(1)

    def _norms(self) -> HeadNorms | None:
        if not self._has_norms:
            return None
        q_norm, k_norm = self.q_norm, self.k_norm
        return HeadNorms(q_norm.weight, k_norm.weight, q_norm.eps, q_norm.around_one)


class SelfAttention(AttentionLayer):
    """With a projection each for queries, keys and values, computed as one product."""

    def __init__(self, build: Build, layer: int, *, around_one: bool = False) -> None:
        super().__init__(build, layer, around_one=around_one)
        config, tp, place = build.config, build.tp, build.place
        bias, size, queries = config.attention_bias, config.hidden_size, build.queries
        self.q_proj = ColumnParallelLinear(size, queries, bias, place)
        self.k_proj = ColumnParallelLinear(size, build.keys, bias, place)
        self.v_proj = ColumnParallelLinear(size, build.keys, bias, place)
        self._qkv = FusedLinear(self.q_proj, self.k_proj, self.v_proj)
        self.o_proj = RowParallelLinear(queries, size, config.attention_output_bias, tp, place)

    def projections(self) -> tuple[Projection, Projection]:
        """See ``AttentionLayer``."""
        return self._qkv, self.o_proj


class GatedMLP(nn.Module):
    """The gated feed-forward layer."""

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
        """``[num_tokens, hidden]`` to the same."""
        out: Tensor = self.down_proj(ops.gate(self._gate_up(x), self._activation))
        return out


class Stack(nn.Module):
    """Layers over a residual stream."""

    def __init__(self, build: Build) -> None:
        super().__init__()
        config = build.config
        self._ropes = [config.rope_of(layer) for layer in range(config.num_layers)]
        device, dim = build.place.device, config.head_dim
        self._rotary = {rope: RotaryEmbedding(rope, dim, device) for rope in set(self._ropes)}

    def run(
        self,
        residual: Tensor,  # [num_tokens, hidden], overwritten
        layers: Iterable[nn.Module],
        norm: nn.Module,
        batch: ForwardBatch,
        kv_cache: KVCache,
    ) -> Tensor:
        """The states of the sampled tokens, ``[num_sampled, hidden]``."""
        rotations = {rope: rotary(batch.positions) for rope, rotary in self._rotary.items()}
        x: Tensor | None = None
        for rope, layer in zip(self._ropes, layers, strict=True):
            x = layer(x, residual, rotations[rope], batch.attention, kv_cache)
        if batch.sample_indices is not None:
            x = None if x is None else x[batch.sample_indices]
            residual = residual[batch.sample_indices]
        states: Tensor = norm(x, residual)
        return states


class Layer(nn.Module, ABC):
    """Attention, then feed-forward, each on a normed copy and added; the family names its parts."""

    @abstractmethod
    def parts(self) -> Parts:
        """A norm, attention, a norm, feed-forward."""

    def forward(
        self,
        x: Tensor | None,
        residual: Tensor,
        rotation: Rotation,
        metadata: AttentionMetadata,
        kv_cache: KVCache,
    ) -> Tensor | None:
        """What this layer adds to ``residual``, where ``x`` of the layer before is added first.

        All ``[num_tokens, hidden]``.
        """
        first_norm, attention, second_norm, feed_forward = self.parts()
        x = first_norm(x, residual)
        x = attention(x, rotation, metadata, kv_cache)
        x = second_norm(x, residual)  # what attention gave is let go before memory is at its peak
        return feed_forward(x)


class DecoderLayer(Layer):
    """By the names of most families."""

    def __init__(self, build: Build, attention: nn.Module, mlp: nn.Module) -> None:
        super().__init__()
        size, eps = build.config.hidden_size, build.config.norm_eps
        self.input_layernorm = RMSNorm(size, eps, build.place)
        self.self_attn = attention
        self.post_attention_layernorm = RMSNorm(size, eps, build.place)
        self.mlp = mlp

    def parts(self) -> Parts:
        """See ``Layer``."""
        return self.input_layernorm, self.self_attn, self.post_attention_layernorm, self.mlp


class Decoder(Stack):
    """From token ids to the last layer's hidden states, by the names of most families."""

    def __init__(self, build: Build, layers: Iterable[nn.Module], norm: RMSNorm) -> None:
        super().__init__(build)
        config, place = build.config, build.place
        size = config.hidden_size
        self.embed_tokens = VocabParallelEmbedding(config.vocab_size, size, build.tp, place)
        self.layers = nn.ModuleList(layers)
        self.norm = norm
        # As a number of the activations' type, which is what the families' own code multiplies by.
        self._scale = torch.tensor(config.embedding_scale, dtype=place.dtype).item()

    def forward(self, batch: ForwardBatch, kv_cache: KVCache) -> Tensor:
        """The states of the sampled tokens, ``[num_sampled, hidden]``."""
        residual = self.embed_tokens(batch.token_ids)
        if self._scale != 1.0:
            residual = residual * self._scale
        return self.run(residual, self.layers, self.norm, batch, kv_cache)


class CausalLM(nn.Module, ABC):
    """A language model by the names of most families; its layers are the family's.

    Parameters are uninitialised until weights are loaded.
    """

    base_prefix = "model"  # which checkpoints of the bare model go without

    def __init__(self, build: Build) -> None:
        super().__init__()
        layers = (self.make_layer(build, layer) for layer in range(build.config.num_layers))
        self.model = Decoder(build, layers, self.make_norm(build))
        self.lm_head = make_head(build, self.model.embed_tokens)
        self._logit_softcap = build.config.logit_softcap

    @abstractmethod
    def make_layer(self, build: Build, layer: int) -> nn.Module:
        """One layer, called as ``Layer`` is."""

    def make_norm(self, build: Build) -> RMSNorm:
        """The norm after the last layer."""
        return RMSNorm(build.config.hidden_size, build.config.norm_eps, build.place)

    def forward(self, batch: ForwardBatch, kv_cache: KVCache) -> Tensor | None:
        """Logits ``[num_sampled, vocab_size]`` on the leader of ``tp``, else None."""
        logits: Tensor | None = self.lm_head(self.model(batch, kv_cache))
        if logits is not None and self._logit_softcap is not None:
            logits = logits.div_(self._logit_softcap).tanh_().mul_(self._logit_softcap)
        return logits


def make_head(build: Build, embedding: VocabParallelEmbedding) -> ParallelLMHead:
    """The layer from states to logits; its weights are those of ``embedding`` if they are tied."""
    config = build.config
    size = config.embedding_size or config.hidden_size
    head = ParallelLMHead(config.vocab_size, size, build.tp, build.place)
    if config.tie_word_embeddings:
        head.weight = embedding.weight
    return head
