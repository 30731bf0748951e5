"""Which class implements which architecture.

To add a family:

1. Read its config.json: a function in ``serve.model_config.families``, with an entry in
   ``FAMILIES``. If the config describes Llama's layers, use the architecture "llama"; done.
2. Write its modules in one file here, named after the family. Begin with ``llama`` or ``phi3`` if
   its checkpoint keys are the usual ones, with ``gpt2`` or ``internlm2`` otherwise. The family
   names its projections (``AttentionLayer.projections``), its norms and sublayers
   (``Layer.parts``), and ``base_prefix``: the part of the keys that checkpoints of the bare model
   lack. Module paths must equal checkpoint keys; loading reports every key that is missing or left
   over.
3. Enter the class in ``MODELS``.
4. Add a tiny variant to ``tests/support/families.py``; the tests compare its greedy tokens with
   those of transformers.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from serve.comm.tensor_parallel import TensorParallel
from serve.model.attention import Attention, torch_attention
from serve.model.build import Build
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
    """Build this rank's shard of the model. Its parameters are uninitialised: see ``load_weights``.

    Raises ``ValueError`` if the architecture is unknown or ``tp`` does not divide the query heads.
    """
    if config.architecture not in MODELS:
        supported = ", ".join(MODELS)
        raise ValueError(
            f"architecture {config.architecture!r} is not supported; supported: {supported}"
        )
    place = Placement(dtype, torch.device(device))
    return MODELS[config.architecture](Build(config, tp, place, attention))
