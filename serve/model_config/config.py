"""ModelConfig: a checkpoint's description in our own terms. No torch.

What config.json calls things, and every quirk of a family, is known to ``config_families``.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from serve.model_config.kv_layout import KVLayout, shard_kv_heads
from serve.model_config.rope import RopeConfig


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """The architecture of one checkpoint."""

    architecture: str  # key of the model registry, e.g. "llama"
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_position_embeddings: int  # the context that can be served, rope scaling included
    norm_eps: float
    rope: RopeConfig | None  # None: positions do not rotate
    tie_word_embeddings: bool
    dtype: str  # of the checkpoint: float32, bfloat16, float16
    eos_token_ids: tuple[int, ...]
    attention_bias: bool = False  # q, k, v
    attention_output_bias: bool = False
    mlp_bias: bool = False
    activation: str = "silu"  # silu, gelu, gelu_tanh, relu
    qk_norm: bool = False  # queries and keys are normed, head by head, before they are rotated
    windows: tuple[int | None, ...] = ()  # by layer: how far back attention sees; (): all of it
    local_rope: RopeConfig | None = None  # of layers with a window; None: the same
    unrotated_layers: frozenset[int] = field(default_factory=frozenset)
    attention_scale: float | None = None  # of scores; None: 1 / sqrt(head_dim)
    attention_softcap: float | None = None  # scores become cap * tanh(score / cap)
    logit_softcap: float | None = None
    embedding_scale: float = 1.0
    embedding_size: int | None = None  # where it is not hidden_size
    norms_first: bool = True  # before attention and feed-forward, not after
    has_final_norm: bool = True

    def window_of(self, layer: int) -> int | None:
        """How many positions a token of ``layer`` sees, its own counted; None: all before."""
        return self.windows[layer] if self.windows else None

    def rope_of(self, layer: int) -> RopeConfig | None:
        """How ``layer`` rotates."""
        if layer in self.unrotated_layers:
            return None
        if self.local_rope is not None and self.window_of(layer) is not None:
            return self.local_rope
        return self.rope

    @property
    def max_window(self) -> int | None:
        """Beyond how many positions no layer looks back; None if there is no such number."""
        windows = [self.window_of(layer) for layer in range(self.num_layers)]
        known = [window for window in windows if window is not None]
        return max(known) if len(known) == self.num_layers else None

    def for_context(self, num_positions: int) -> ModelConfig:
        """The model where no sequence is longer: LongRoPE has another rotation for short ones."""
        if self.rope is None or self.rope.type != "longrope":
            return self
        is_long = num_positions > self.rope.original_max_position_embeddings
        return replace(self, rope=replace(self.rope, is_long=is_long))

    def kv_layout(self, block_size: int, element_bytes: int, tp: int, tp_rank: int) -> KVLayout:
        """The KV cache of one rank of a replica of ``tp`` ranks."""
        heads = shard_kv_heads(self.num_heads, self.num_kv_heads, tp, tp_rank)
        return KVLayout(self.num_layers, block_size, heads, self.head_dim, element_bytes)
