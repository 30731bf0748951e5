"""Which class builds which architecture."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from serve.comm.tensor_parallel import TensorParallel
from serve.model.attention import Attention, torch_attention
from serve.model.decoder import Build
from serve.model.gemma import GemmaForCausalLM
from serve.model.gpt2 import GPT2LMHeadModel
from serve.model.internlm2 import InternLM2ForCausalLM
from serve.model.layers import Placement
from serve.model.llama import LlamaForCausalLM
from serve.model.opt import OPTForCausalLM
from serve.model.phi3 import Phi3ForCausalLM
from serve.model_config.config import ModelConfig

MODELS: dict[str, Callable[[Build], nn.Module]] = {
    "gemma": GemmaForCausalLM,
    "gpt2": GPT2LMHeadModel,
    "internlm2": InternLM2ForCausalLM,
    "llama": LlamaForCausalLM,
    "opt": OPTForCausalLM,
    "phi3": Phi3ForCausalLM,
}


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
    place = Placement(dtype, torch.device(device))
    return MODELS[config.architecture](Build(config, tp, place, attention))
