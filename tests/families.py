"""Random tiny checkpoints of every family, as transformers writes them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers

VOCAB_SIZE = 128

# By variant: transformers' configuration class and what differs from SMALL.
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "mistral": ("MistralConfig", {"sliding_window": None}),
    "mistral, window": ("MistralConfig", {"sliding_window": 7}),
    "smollm3": ("SmolLM3Config", {"num_hidden_layers": 5}),
    "smollm3, every other layer rotates": (
        "SmolLM3Config",
        {"no_rope_layers": [1, 0, 1], "num_hidden_layers": 3, "tie_word_embeddings": False},
    ),
}

SMALL: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}


def write_variant(path: Path, name: str, seed: int) -> Path:
    """A float32 checkpoint of one variant in ``path``."""
    kind, changes = VARIANTS[name]
    config = getattr(transformers, kind)(**SMALL | changes)
    model = transformers.AutoModelForCausalLM.from_config(config)
    assert sum(parameter.numel() for parameter in model.parameters()) <= 2_000_000
    randomise(model, seed)
    model.save_pretrained(path)
    return path


def randomise(model: torch.nn.Module, seed: int) -> None:
    """Weights for greedy output that wanders and whose choices are clear."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            around = parameter.mean()  # of a norm's weights 0 or 1, by the family's convention
            if parameter.dim() == 1 and name.endswith("weight"):
                parameter.normal_(0.0, 0.2, generator=generator).add_(around.round())
            elif parameter.dim() == 1:
                parameter.normal_(0.0, 0.3, generator=generator)
            else:
                parameter.normal_(0.0, 1.5 * parameter.shape[-1] ** -0.5, generator=generator)
