"""What is settled for a rank before anything is loaded: device, dtype, block size, layouts."""

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
    """What can be said of every rank before anything is loaded."""

    config: ServerConfig
    topology: Topology
    rank_info: RankInfo
    device: torch.device

    @property
    def replica(self) -> ReplicaInfo:
        """This rank's replica."""
        return self.topology.replica_of(self.rank_info.rank)

    @property
    def limits(self) -> PhaseLimits:
        """What this rank's replica may take on."""
        return limits_of(self.config, self.replica.role)

    @property
    def dtype(self) -> torch.dtype:
        """Of weights, activations and KV.

        Unless told: float32 on a CPU; on a GPU the checkpoint's own, and bfloat16 for float32,
        which the fast kernels do not take.
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
        """Tokens in a block."""
        return self.config.block_size or preferred_block_size(self.device)

    @property
    def layout(self) -> KVLayout:
        """The KV layout of this rank."""
        return self.layouts(self.replica)[self.topology.tp_rank(self.rank_info.rank)]

    def layouts(self, replica: ReplicaInfo) -> tuple[KVLayout, ...]:
        """The KV layout of each tp rank of a replica."""
        model = self.config.model_config
        size = self.dtype.itemsize
        return tuple(
            model.kv_layout(self.block_size, size, replica.tp, tp_rank)
            for tp_rank in range(replica.tp)
        )

    @property
    def max_push_blocks(self) -> int:
        """Blocks in the largest push: ``kv_push_bytes``, at least one, at most a whole context."""
        config = self.config
        layout = config.model_config.kv_layout(self.block_size, self.dtype.itemsize, 1, 0)
        context = config.max_model_len or config.model_config.max_position_embeddings
        wanted = config.kv_push_bytes // layout.block_bytes
        return max(1, min(wanted, layout.num_blocks_for(context)))


def limits_of(config: ServerConfig, role: Role) -> PhaseLimits:
    """A replica that only prefills has limits of its own; all others have decode's."""
    return config.prefill if role is Role.PREFILL else config.decode
