"""ModelConfig: a checkpoint's description, and every quirk of config.json in one place. No torch."""

from __future__ import annotations

from dataclasses import dataclass

from serve.engine.kv_layout import KVLayout, shard_kv_heads


@dataclass(frozen=True, slots=True)
class RopeConfig:
    """How positions rotate queries and keys."""

    theta: float
    type: str = "default"  # default, linear, dynamic, llama3, yarn
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position_embeddings: int = 0
    attention_factor: float | None = None
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """The architecture of one checkpoint, in our own terms."""

    architecture: str  # key of the model registry, e.g. "llama"
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_position_embeddings: int
    rms_norm_eps: float
    rope: RopeConfig
    tie_word_embeddings: bool
    attention_bias: bool  # q, k, v
    attention_output_bias: bool
    mlp_bias: bool
    dtype: str  # of the checkpoint: float32, bfloat16, float16
    eos_token_ids: tuple[int, ...]

    def kv_layout(self, block_size: int, element_bytes: int, tp: int, tp_rank: int) -> KVLayout:
        """The KV cache of one rank of a replica of ``tp`` ranks."""
        heads = shard_kv_heads(self.num_heads, self.num_kv_heads, tp, tp_rank)
        return KVLayout(self.num_layers, block_size, heads, self.head_dim, element_bytes)
