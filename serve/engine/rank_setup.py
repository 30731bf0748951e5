"""RankSetup: a rank's device, dtype, block size and KV layout, known before loading."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from serve.config.limits import PhaseLimits
from serve.config.server import ServerConfig
from serve.model.flash_attention import preferred_block_size
from serve.model_config.kv_layout import KVLayout
from serve.topology import RankInfo, ReplicaInfo, Role, Topology


@dataclass(frozen=True, slots=True)
class RankSetup:
    """The configuration of one rank, and the values that follow from it."""

    config: ServerConfig
    topology: Topology
    rank_info: RankInfo
    device: torch.device

    @property
    def replica(self) -> ReplicaInfo:
        return self.topology.replica_of(self.rank_info.rank)

    @property
    def limits(self) -> PhaseLimits:
        """The limits on the steps and the memory of this rank's replica."""
        return limits_of(self.config, self.replica.role)

    @property
    def dtype(self) -> torch.dtype:
        """The type of weights, activations and KV.

        The default on a CPU is float32. On a GPU it is the checkpoint's type, or bfloat16 if that
        is float32, because the fast kernels do not support float32.
        """
        name: str = self.config.dtype
        if name == "auto":
            name = "float32" if self.device.type == "cpu" else self.config.model_config.dtype
            if self.device.type != "cpu" and name == "float32":
                name = "bfloat16"
        dtype: torch.dtype = getattr(torch, name)
        return dtype

    @property
    def block_size(self) -> int:
        """Tokens per KV block: the option, or the attention kernel's preference."""
        return self.config.block_size or preferred_block_size(self.device)

    @property
    def layout(self) -> KVLayout:
        """The KV layout of this rank."""
        return self.layouts(self.replica)[self.topology.tp_rank(self.rank_info.rank)]

    def layouts(self, replica: ReplicaInfo) -> tuple[KVLayout, ...]:
        """Return the KV layout of each tp rank of ``replica``."""
        model = self.config.model_config
        size = self.dtype.itemsize
        return tuple(
            model.kv_layout(self.block_size, size, replica.tp, tp_rank)
            for tp_rank in range(replica.tp)
        )

    @property
    def max_push_blocks(self) -> int:
        """Blocks in the largest push: ``kv_push_bytes``, at least 1, at most a whole context."""
        config = self.config
        layout = config.model_config.kv_layout(self.block_size, self.dtype.itemsize, 1, 0)
        context = config.max_model_len or config.model_config.max_position_embeddings
        num_blocks = config.kv_push_bytes // layout.block_bytes
        return max(1, min(num_blocks, layout.num_blocks_for(context)))


def limits_of(config: ServerConfig, role: Role) -> PhaseLimits:
    """Return the prefill limits for a replica that only prefills, else the decode limits."""
    return config.prefill if role is Role.PREFILL else config.decode
