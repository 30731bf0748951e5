"""OPT: learned positions from row 2 on, ReLU, LayerNorm before or (350m) after each part."""

from __future__ import annotations

from torch import Tensor, nn

from serve.kv.cache import KVCache
from serve.model.decoder import (
    AttentionLayer,
    Build,
    Layer,
    Parts,
    Projection,
    Rotation,
    Stack,
    make_head,
)
from serve.model.forward_batch import AttentionMetadata, ForwardBatch
from serve.model.kernels import ops
from serve.model.layers import (
    ColumnParallelLinear,
    FusedLinear,
    LayerNorm,
    NoNorm,
    PositionEmbedding,
    Range,
    RowParallelLinear,
    VocabParallelEmbedding,
)

_POSITION_OFFSET = 2


class OPTAttention(AttentionLayer):
    """With a projection each for queries, keys and values, all with biases."""

    def __init__(self, build: Build, layer: int) -> None:
        super().__init__(build, layer)
        size, place = build.config.hidden_size, build.place
        self.q_proj = ColumnParallelLinear(size, build.queries, True, place)
        self.k_proj = ColumnParallelLinear(size, build.keys, True, place)
        self.v_proj = ColumnParallelLinear(size, build.keys, True, place)
        self._qkv = FusedLinear(self.q_proj, self.k_proj, self.v_proj)
        self.out_proj = RowParallelLinear(build.queries, size, True, build.tp, place)

    def projections(self) -> tuple[Projection, Projection]:
        """See ``AttentionLayer``."""
        return self._qkv, self.out_proj


class OPTLayer(Layer):
    """One layer: attention, then feed-forward, each normed before it or, added, after it."""

    def __init__(self, build: Build, layer: int) -> None:
        super().__init__()
        config, place = build.config, build.place
        size, eps = config.hidden_size, config.norm_eps
        self._norms_first, self._activation = config.norms_first, config.activation
        self.self_attn = OPTAttention(build, layer)
        self.self_attn_layer_norm = LayerNorm(size, eps, place)
        self.fc1 = ColumnParallelLinear(size, build.inner, True, place)
        self.fc2 = RowParallelLinear(build.inner, size, True, build.tp, place)
        self.final_layer_norm = LayerNorm(size, eps, place)

    def parts(self) -> Parts:
        """See ``Layer``; where the norms come first."""
        norms = self.self_attn_layer_norm, self.final_layer_norm
        return norms[0], self.self_attn, norms[1], self._feed_forward

    def forward(
        self,
        x: Tensor | None,
        residual: Tensor,
        rotation: Rotation,
        metadata: AttentionMetadata,
        kv_cache: KVCache,
    ) -> Tensor | None:
        """See ``Layer``; None if all has been added already."""
        if self._norms_first:
            return super().forward(x, residual, rotation, metadata, kv_cache)
        x = self.self_attn(residual, rotation, metadata, kv_cache)
        residual.copy_(self.self_attn_layer_norm(x, residual))
        x = self._feed_forward(residual)
        residual.copy_(self.final_layer_norm(x, residual))
        return None

    def _feed_forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.fc2(ops.activate(self.fc1(x), self._activation))
        return out


class OPTDecoder(Stack):
    """From token ids to the last layer's hidden states."""

    def __init__(self, build: Build) -> None:
        super().__init__(build)
        config, tp, place = build.config, build.tp, build.place
        size, positions = config.hidden_size, config.max_position_embeddings
        narrow = config.embedding_size or size
        self.embed_tokens = VocabParallelEmbedding(config.vocab_size, narrow, tp, place)
        self.embed_positions = PositionEmbedding(positions, size, _POSITION_OFFSET, place)
        layers = range(config.num_layers)
        self.layers = nn.ModuleList(OPTLayer(build, layer) for layer in layers)
        self.final_layer_norm = (
            LayerNorm(size, config.norm_eps, place) if config.has_final_norm else NoNorm()
        )
        self.project_in, self.project_out = None, None
        if narrow != size:  # on every rank whole
            self.project_in = ColumnParallelLinear(narrow, Range.all(size), False, place)
            self.project_out = ColumnParallelLinear(size, Range.all(narrow), False, place)

    def forward(self, batch: ForwardBatch, kv_cache: KVCache) -> Tensor:
        """The states of the sampled tokens, ``[num_sampled, embedding_size]``."""
        residual = self.embed_tokens(batch.token_ids)
        if self.project_in is not None:
            residual = self.project_in(residual)
        residual = residual + self.embed_positions(batch.positions)
        states = self.run(residual, self.layers, self.final_layer_norm, batch, kv_cache)
        return states if self.project_out is None else self.project_out(states)


class OPTModel(nn.Module):
    """The decoder under the name that checkpoints give it."""

    def __init__(self, build: Build) -> None:
        super().__init__()
        self.decoder = OPTDecoder(build)


class OPTForCausalLM(nn.Module):
    """The language model."""

    base_prefix = "model.decoder"  # of which checkpoints of bare models lack "model", or all

    def __init__(self, build: Build) -> None:
        super().__init__()
        self.model = OPTModel(build)
        self.lm_head = make_head(build, self.model.decoder.embed_tokens)

    def forward(self, batch: ForwardBatch, kv_cache: KVCache) -> Tensor | None:
        """Logits ``[num_sampled, vocab_size]`` on the leader of ``tp``, else None."""
        logits: Tensor | None = self.lm_head(self.model.decoder(batch, kv_cache))
        return logits
