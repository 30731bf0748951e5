"""Which class builds which architecture."""

from __future__ import annotations

import torch
from torch import nn

from serve.comm.tensor_parallel import TensorParallel
from serve.model.attention import Attention, torch_attention
from serve.model.config import ModelConfig
from serve.model.llama import LlamaForCausalLM

MODELS = {"llama": LlamaForCausalLM}


def build_model(
    config: ModelConfig,
    tp: TensorParallel,
    dtype: torch.dtype,
    device: torch.device | str,
    attention: Attention = torch_attention,
) -> nn.Module:
    """The model of ``config``, this rank's shard, without weights yet (see ``load_weights``).

    Raises ``ValueError`` for an unknown architecture and a tp that does not divide the heads.
    """
    if config.architecture not in MODELS:
        supported = ", ".join(MODELS)
        raise ValueError(f"model {config.architecture!r} is not known; known: {supported}")
    return MODELS[config.architecture](config, tp, dtype, device, attention)
