"""Model: writes the tiny Llama checkpoint that a soak serves, with a tokenizer of single bytes."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

_SPECIAL = ("<|end|>", "<|system|>", "<|user|>", "<|assistant|>")
VOCAB_SIZE = 256 + len(_SPECIAL)
EOS_ID = 256
CONTEXT = 1024

_HIDDEN, _LAYERS, _HEADS, _KV_HEADS, _HEAD_DIM, _MLP = 64, 2, 4, 2, 16, 96
_CHAT_TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}<|end|>"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def write_model(folder: Path, seed: int = 1) -> Path:
    """Write config.json, the weights and the tokenizer into ``folder`` and return it."""
    folder.mkdir(parents=True, exist_ok=True)
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "torch_dtype": "float32",
        "vocab_size": VOCAB_SIZE,
        "hidden_size": _HIDDEN,
        "intermediate_size": _MLP,
        "num_hidden_layers": _LAYERS,
        "num_attention_heads": _HEADS,
        "num_key_value_heads": _KV_HEADS,
        "head_dim": _HEAD_DIM,
        "hidden_act": "silu",
        "max_position_embeddings": CONTEXT,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
        "eos_token_id": EOS_ID,
    }
    (folder / "config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")
    save_file(_weights(seed), folder / "model.safetensors", metadata={"format": "pt"})
    _write_tokenizer(folder)
    return folder


def _weights(seed: int) -> dict[str, NDArray[np.float32]]:
    """Draw weights so large that greedy output varies and the best token is clear."""
    rng = np.random.default_rng(seed)
    queries, keys = _HEADS * _HEAD_DIM, _KV_HEADS * _HEAD_DIM
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (VOCAB_SIZE, _HIDDEN),
        "model.norm.weight": (_HIDDEN,),
        "lm_head.weight": (VOCAB_SIZE, _HIDDEN),
    }
    for layer in range(_LAYERS):
        name = f"model.layers.{layer}"
        shapes |= {
            f"{name}.input_layernorm.weight": (_HIDDEN,),
            f"{name}.post_attention_layernorm.weight": (_HIDDEN,),
            f"{name}.self_attn.q_proj.weight": (queries, _HIDDEN),
            f"{name}.self_attn.k_proj.weight": (keys, _HIDDEN),
            f"{name}.self_attn.v_proj.weight": (keys, _HIDDEN),
            f"{name}.self_attn.o_proj.weight": (_HIDDEN, queries),
            f"{name}.mlp.gate_proj.weight": (_MLP, _HIDDEN),
            f"{name}.mlp.up_proj.weight": (_MLP, _HIDDEN),
            f"{name}.mlp.down_proj.weight": (_HIDDEN, _MLP),
        }
    drawn = {}
    for name, shape in shapes.items():
        mean, deviation = (1.0, 0.2) if len(shape) == 1 else (0.0, 1.5 * shape[-1] ** -0.5)
        drawn[name] = rng.normal(mean, deviation, shape).astype(np.float32)
    return drawn


def _write_tokenizer(folder: Path) -> None:
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(letters)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(list(_SPECIAL))
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": _SPECIAL[0],
        "chat_template": _CHAT_TEMPLATE,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
