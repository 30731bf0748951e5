"""Build: the common arguments of all layers of one model, and this rank's part of the weights."""

from __future__ import annotations

from dataclasses import dataclass

from serve.comm.tensor_parallel import TensorParallel
from serve.model.attention import Attention
from serve.model.layers import Placement, Range
from serve.model_config.config import ModelConfig
from serve.model_config.kv_layout import shard_kv_heads


@dataclass(frozen=True, slots=True)
class Build:
    """The arguments of every layer's constructor.

    The ranges are in rows (output features) of checkpoint tensors.
    """

    config: ModelConfig
    tp: TensorParallel
    place: Placement
    attention: Attention

    @property
    def queries(self) -> Range:
        """Rows of this rank's query heads."""
        return Range.even(self.config.num_heads * self.config.head_dim, self.tp)

    @property
    def kv_heads(self) -> tuple[int, ...]:
        """The KV heads that this rank's query heads read; see ``shard_kv_heads``."""
        config, tp = self.config, self.tp
        return shard_kv_heads(config.num_heads, config.num_kv_heads, tp.size, tp.rank)

    @property
    def keys(self) -> Range:
        """Rows of ``kv_heads``, in the key projection and in the value projection alike."""
        return Range.heads(self.config.num_kv_heads, self.config.head_dim, self.kv_heads)

    @property
    def qkv(self) -> Range:
        """Rows of queries, keys and values in a checkpoint tensor that holds all three."""
        return self.queries.and_then(self.keys, self.keys)

    @property
    def inner(self) -> Range:
        """This rank's rows of the feed-forward layer's intermediate dimension."""
        return Range.even(self.config.intermediate_size, self.tp)
