"""OPT: learned positions, ReLU, LayerNorm before each sublayer (OPT-350m: after each)."""

from __future__ import annotations

from torch import Tensor, nn

from serve.kv.cache import KVCache
from serve.model.build import Build
from serve.model.decoder import (
    AttentionLayer,
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

_POSITION_OFFSET = 2  # the table has two unused rows before position 0


class OPTAttention(AttentionLayer):
    """Attention with separate projections for queries, keys and values, all with biases."""

    def __init__(self, build: Build, layer: int) -> None:
        super().__init__(build, layer)
        size, place = build.config.hidden_size, build.place
        self.q_proj = ColumnParallelLinear(size, build.queries, True, place)
        self.k_proj = ColumnParallelLinear(size, build.keys, True, place)
        self.v_proj = ColumnParallelLinear(size, build.keys, True, place)
        self._qkv = FusedLinear(self.q_proj, self.k_proj, self.v_proj)
        self.out_proj = RowParallelLinear(build.queries, size, True, build.tp, place)

    def projections(self) -> tuple[Projection, Projection]:
        return self._qkv, self.out_proj


class OPTLayer(Layer):
    """One decoder layer, with norms before its sublayers or after their residual additions."""

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
        """Return the modules in the order of norms first; ``forward`` handles the other order."""
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
        """See ``Layer.forward``. Return None with norms last: they leave nothing to add."""
        if self._norms_first:
            return super().forward(x, residual, rotation, metadata, kv_cache)
        x = self.self_attn(residual, rotation, metadata, kv_cache)  # [num_tokens, hidden]
        residual.copy_(self.self_attn_layer_norm(x, residual))
        x = self._feed_forward(residual)
        residual.copy_(self.final_layer_norm(x, residual))
        return None

    def _feed_forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.fc2(ops.activate(self.fc1(x), self._activation))
        return out


class OPTDecoder(Stack):
    """Token ids to final hidden states. OPT-350m projects embeddings in and states out."""

    def __init__(self, build: Build) -> None:
        super().__init__(build)
        config, tp, place = build.config, build.tp, build.place
        size, positions = config.hidden_size, config.max_position_embeddings
        embedding_size = config.embedding_size or size
        self.embed_tokens = VocabParallelEmbedding(config.vocab_size, embedding_size, tp, place)
        self.embed_positions = PositionEmbedding(positions, size, _POSITION_OFFSET, place)
        layers = range(config.num_layers)
        self.layers = nn.ModuleList(OPTLayer(build, layer) for layer in layers)
        self.final_layer_norm = (
            LayerNorm(size, config.norm_eps, place) if config.has_final_norm else NoNorm()
        )
        self.project_in, self.project_out = None, None
        if embedding_size != size:  # replicated: every rank holds the whole weights
            self.project_in = ColumnParallelLinear(embedding_size, Range.all(size), False, place)
            self.project_out = ColumnParallelLinear(size, Range.all(embedding_size), False, place)

    def forward(self, batch: ForwardBatch, kv_cache: KVCache) -> Tensor:
        """Return the final states of the sampled tokens, ``[num_sampled, embedding_size]``."""
        residual = self.embed_tokens(batch.token_ids)  # [num_tokens, embedding_size]
        if self.project_in is not None:
            residual = self.project_in(residual)
        residual = residual + self.embed_positions(batch.positions)  # [num_tokens, hidden]
        states = self.run(residual, self.layers, self.final_layer_norm, batch, kv_cache)
        return states if self.project_out is None else self.project_out(states)


class OPTModel(nn.Module):
    """A level of module path that the checkpoint keys have: ``model.decoder``."""

    def __init__(self, build: Build) -> None:
        super().__init__()
        self.decoder = OPTDecoder(build)


class OPTForCausalLM(nn.Module):
    """OPT."""

    base_prefix = "model.decoder"  # checkpoints of the bare model lack "model." or all of it

    def __init__(self, build: Build) -> None:
        super().__init__()
        self.model = OPTModel(build)
        self.lm_head = make_head(build, self.model.decoder.embed_tokens)

    def forward(self, batch: ForwardBatch, kv_cache: KVCache) -> Tensor | None:
        """Return logits ``[num_sampled, vocab_size]`` on the leader of ``tp``, None elsewhere."""
        logits: Tensor | None = self.lm_head(self.model.decoder(batch, kv_cache))
        return logits
