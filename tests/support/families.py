"""Random tiny checkpoints of every family, written by transformers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import save_file

VOCAB_SIZE = 128

LONGROPE: dict[str, Any] = {
    "rope_type": "longrope",
    "rope_theta": 1e4,
    "short_factor": [1.0, 1.1, 1.2, 1.3, 1.5, 1.7, 2.0, 2.5],
    "long_factor": [1.0, 1.5, 2.0, 3.0, 5.0, 8.0, 12.0, 20.0],
}

YARN: dict[str, Any] = {
    "rope_type": "yarn",
    "rope_theta": 1e4,
    "factor": 4.0,
    "original_max_position_embeddings": 32,
}

# By variant: transformers' configuration class, and values that differ from SMALL.
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "mistral": ("MistralConfig", {"sliding_window": None}),
    "mistral, window": ("MistralConfig", {"sliding_window": 7}),
    "smollm3": ("SmolLM3Config", {"num_hidden_layers": 5}),
    "smollm3, every other layer rotates": (
        "SmolLM3Config",
        {"no_rope_layers": [1, 0, 1], "num_hidden_layers": 3, "tie_word_embeddings": False},
    ),
    "qwen2": ("Qwen2Config", {"tie_word_embeddings": True}),
    "qwen2, yarn": ("Qwen2Config", {"rope_parameters": YARN, "max_position_embeddings": 32}),
    "qwen2, windows": (
        "Qwen2Config",
        {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 1},
    ),
    "qwen3": ("Qwen3Config", {"head_dim": 32}),
    "qwen3, biases": ("Qwen3Config", {"head_dim": 16, "attention_bias": True}),
    "phi3": ("Phi3Config", {}),
    "phi3, window": ("Phi3Config", {"sliding_window": 9}),
    "phi3, longrope within": (
        "Phi3Config",
        {"rope_parameters": LONGROPE, "original_max_position_embeddings": 256},
    ),
    "phi3, longrope beyond": (
        "Phi3Config",
        {
            "rope_parameters": LONGROPE,
            "original_max_position_embeddings": 4,
            "tie_word_embeddings": True,
        },
    ),
    "phi4, part of a head": (
        "Phi3Config",
        {
            "rope_parameters": {
                "rope_theta": 1e4,
                "rope_type": "default",
                "partial_rotary_factor": 0.75,
            }
        },
    ),
    "gemma2": ("Gemma2Config", {"head_dim": 32, "sliding_window": 8, "query_pre_attn_scalar": 24}),
    "gemma2, no caps": (
        "Gemma2Config",
        {
            "head_dim": 16,
            "sliding_window": 5,
            "num_hidden_layers": 3,
            "attn_logit_softcapping": None,
            "final_logit_softcapping": None,
        },
    ),
    "gemma3": ("Gemma3TextConfig", {"head_dim": 32, "sliding_window": 8, "num_hidden_layers": 7}),
    "gemma3, scaled": (
        "Gemma3TextConfig",
        {
            "head_dim": 16,
            "sliding_window": 5,
            "num_hidden_layers": 3,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
                "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
            },
        },
    ),
    "gemma3, caps": (
        "Gemma3TextConfig",
        {
            "head_dim": 16,
            "sliding_window": 5,
            "num_hidden_layers": 3,
            "attn_logit_softcapping": 0.2,  # transformers ignores it
            "final_logit_softcapping": 3.0,
        },
    ),
    "gpt2": ("GPT2Config", {}),
    "gpt2, wide": ("GPT2Config", {"n_inner": 100, "activation_function": "gelu"}),
    "opt": ("OPTConfig", {"ffn_dim": 96}),
    "opt, 350m": (
        "OPTConfig",
        {"ffn_dim": 96, "do_layer_norm_before": False, "word_embed_proj_dim": 32},
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
    """Write a float32 checkpoint of one variant to ``path``."""
    kind, changes = VARIANTS[name]
    config = getattr(transformers, kind)(**SMALL | changes)
    model = transformers.AutoModelForCausalLM.from_config(config)
    assert sum(parameter.numel() for parameter in model.parameters()) <= 2_000_000
    randomise(model, seed)
    model.save_pretrained(path)
    return path


def write_internlm2(path: Path, llama: Path) -> Path:
    """Write a Llama's weights to ``path`` as InternLM2, for which transformers has no class."""
    config = json.loads((llama / "config.json").read_text())
    kv_heads, head_dim = config["num_key_value_heads"], config["head_dim"]
    group = config["num_attention_heads"] // kv_heads
    state = transformers.AutoModelForCausalLM.from_pretrained(llama).state_dict()
    renamed: dict[str, torch.Tensor] = {}
    for name, tensor in state.items():
        if name.endswith("q_proj.weight"):
            prefix = name.removesuffix("q_proj.weight")
            q = tensor.view(kv_heads, group, head_dim, -1)
            k, v = (
                state[f"{prefix}{kind}_proj.weight"].view(kv_heads, 1, head_dim, -1)
                for kind in ("k", "v")
            )
            joined = torch.cat([q, k, v], dim=1).flatten(0, 2)
            renamed[prefix.replace("self_attn", "attention") + "wqkv.weight"] = joined
        elif not name.endswith(("k_proj.weight", "v_proj.weight")):
            for llama_name, internlm2_name in _INTERNLM2_NAMES.items():
                name = name.replace(llama_name, internlm2_name)
            renamed[name] = tensor
    path.mkdir()
    contiguous = {name: tensor.contiguous() for name, tensor in renamed.items()}
    save_file(contiguous, path / "model.safetensors")
    config |= {"architectures": ["InternLM2ForCausalLM"], "model_type": "internlm2", "bias": False}
    config["auto_map"] = {"AutoModelForCausalLM": "modeling_internlm2.InternLM2ForCausalLM"}
    (path / "config.json").write_text(json.dumps(config))
    return path


_INTERNLM2_NAMES = {
    "embed_tokens": "tok_embeddings",
    "lm_head": "output",
    "self_attn.o_proj": "attention.wo",
    "input_layernorm": "attention_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "feed_forward.w1",
    "mlp.up_proj": "feed_forward.w3",
    "mlp.down_proj": "feed_forward.w2",
}


def randomise(model: torch.nn.Module, seed: int) -> None:
    """Draw weights that make greedy output vary and the best token clear."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            mean = parameter.mean()  # of a norm's weights: 0 or 1, by the family's convention
            if parameter.dim() == 1 and name.endswith("weight"):
                parameter.normal_(0.0, 0.2, generator=generator).add_(mean.round())
            elif parameter.dim() == 1:
                parameter.normal_(0.0, 0.1, generator=generator)
            else:
                # With tied embeddings, large ones would make the model repeat the last token.
                scale = 0.1 if any(part in name for part in ("embed_tokens", "wte")) else 2.5
                parameter.normal_(0.0, scale * parameter.shape[-1] ** -0.5, generator=generator)
