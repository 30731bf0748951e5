"""ModelConfig: the architecture of one checkpoint, in this project's own terms. No torch.

The keys of config.json and the quirks of each family are in ``families``.
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
    max_position_embeddings: int  # the longest context, with RoPE scaling applied
    norm_eps: float
    rope: RopeConfig | None  # None: no rotary embedding (learned positions)
    tie_word_embeddings: bool
    dtype: str  # of the checkpoint: float32, bfloat16, float16
    eos_token_ids: tuple[int, ...]
    attention_bias: bool = False  # of the q, k and v projections
    attention_output_bias: bool = False
    mlp_bias: bool = False
    activation: str = "silu"  # silu, gelu, gelu_tanh, relu
    qk_norm: bool = False  # norm queries and keys head by head before the rotation
    windows: tuple[int | None, ...] = ()  # sliding window per layer; (): full attention everywhere
    local_rope: RopeConfig | None = None  # of sliding-window layers; None: same as ``rope``
    unrotated_layers: frozenset[int] = field(default_factory=frozenset)
    attention_scale: float | None = None  # of attention scores; None: 1 / sqrt(head_dim)
    attention_softcap: float | None = None  # scores become cap * tanh(score / cap)
    logit_softcap: float | None = None
    embedding_scale: float = 1.0
    embedding_size: int | None = None  # where it differs from hidden_size (OPT-350m)
    norms_first: bool = True  # False: norm after attention and feed-forward (OPT-350m)
    has_final_norm: bool = True

    def window_of(self, layer: int) -> int | None:
        """Return how many positions a token of ``layer`` attends to, itself included.

        None means all positions before it.
        """
        return self.windows[layer] if self.windows else None

    def rope_of(self, layer: int) -> RopeConfig | None:
        """Return the rotation of ``layer``, or None where queries and keys are not rotated."""
        if layer in self.unrotated_layers:
            return None
        if self.local_rope is not None and self.window_of(layer) is not None:
            return self.local_rope
        return self.rope

    @property
    def max_window(self) -> int | None:
        """The largest window, or None if at least one layer attends to the whole context.

        No layer reads the KV of tokens further back, so their blocks can be freed.
        """
        windows = [self.window_of(layer) for layer in range(self.num_layers)]
        finite = [window for window in windows if window is not None]
        return max(finite) if len(finite) == self.num_layers else None

    def for_context(self, num_positions: int) -> ModelConfig:
        """Return the config for serving sequences of at most ``num_positions`` tokens.

        It differs for LongRoPE alone, which has one rotation for short and one for long contexts.
        """
        if self.rope is None or self.rope.type != "longrope":
            return self
        is_long = num_positions > self.rope.original_max_position_embeddings
        return replace(self, rope=replace(self.rope, is_long=is_long))

    def kv_layout(self, block_size: int, element_bytes: int, tp: int, tp_rank: int) -> KVLayout:
        """Return the KV cache layout of rank ``tp_rank`` in a replica of ``tp`` ranks.

        Raises ``ValueError`` if ``tp`` does not divide the query heads.
        """
        heads = shard_kv_heads(self.num_heads, self.num_kv_heads, tp, tp_rank)
        return KVLayout(self.num_layers, block_size, heads, self.head_dim, element_bytes)
