"""A GGUF header of the llama architecture, told in the terms of config.json. No torch."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gguf import GGUFReader

_MISTAKES = (ValueError, KeyError, IndexError, OSError, UnicodeDecodeError)
_END_TOKENS = ("eos_token_id", "eot_token_id", "eom_token_id")
_FILE_TYPES = {0: "float32", 1: "float16"}  # llama.cpp's file types; the others: bfloat16
# Keys that would change the numbers and that we do not honour, with the values that change nothing.
_NEUTRAL: dict[str, tuple[object, ...]] = {
    "expert_count": (None, 0),
    "attention.sliding_window": (None, 0),
    "attention.scale": (None, 0.0),
    "embedding_scale": (None, 0.0, 1.0),
    "residual_scale": (None, 0.0, 1.0),
    "logit_scale": (None, 0.0, 1.0),
    "rope.scale_linear": (None, 1.0),
    "rope.scaling.alpha": (None, 0.0),
    "rope.scaling.attn_factor": (None, 1.0),
    "rope.scaling.yarn_log_multiplier": (None, 0.0),
    "rope.scaling.yarn_ext_factor": (None, 1.0),
    "rope.scaling.yarn_attn_factor": (None, 1.0),
}


def open_gguf(path: Path) -> GGUFReader:
    """The memory-mapped file; ``ValueError`` with one line if it is not a GGUF file."""
    import gguf  # beside torch-free code: only a GGUF file pays for it

    if not path.is_file():
        raise ValueError("the file does not exist")
    try:
        return gguf.GGUFReader(str(path))
    except _MISTAKES as error:
        raise ValueError(f"not a readable GGUF file: {error}") from None


def read_gguf_config(path: Path) -> dict[str, Any]:
    """What config.json would say of the model in ``path``; ``ValueError`` if it is none of ours."""
    try:
        return gguf_config(open_gguf(path))
    except KeyError as error:
        raise ValueError(f"the GGUF header lacks {error}") from None


def gguf_config(reader: GGUFReader) -> dict[str, Any]:
    """The same for an open file; ``KeyError`` names a header key that is not there."""
    values = {
        name: field.contents()
        for name, field in reader.fields.items()
        if not name.startswith("tokenizer.ggml.") or name.endswith("_id")
    }
    architecture = values.get("general.architecture")
    if architecture != "llama":
        raise ValueError(f"GGUF architecture {architecture!r} is not supported: llama is")
    if values.get("split.count", 1) > 1:
        raise ValueError("this is one part of a split GGUF file; merge the parts first")
    for key, neutral in _NEUTRAL.items():
        if values.get(f"llama.{key}") not in neutral:
            raise ValueError(f"GGUF key llama.{key} is not supported")
    return _translate(values, reader)


def _translate(values: dict[str, Any], reader: GGUFReader) -> dict[str, Any]:
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    num_heads = values["llama.attention.head_count"]
    hidden_size = values["llama.embedding_length"]
    head_dim = values.get("llama.attention.key_length", hidden_size // num_heads)
    for key in ("llama.attention.value_length", "llama.rope.dimension_count"):
        if values.get(key, head_dim) != head_dim:
            raise ValueError(f"GGUF key {key} is {values[key]}, the keys' length is {head_dim}")
    ends = [values[key] for name in _END_TOKENS if (key := f"tokenizer.ggml.{name}") in values]
    return {
        "architectures": ["LlamaForCausalLM"],
        "vocab_size": int(tensors["token_embd.weight"].shape[-1]),
        "hidden_size": hidden_size,
        "intermediate_size": values["llama.feed_forward_length"],
        "num_hidden_layers": values["llama.block_count"],
        "num_attention_heads": num_heads,
        "num_key_value_heads": values.get("llama.attention.head_count_kv", num_heads),
        "head_dim": head_dim,
        "max_position_embeddings": values["llama.context_length"],
        "rms_norm_eps": values["llama.attention.layer_norm_rms_epsilon"],
        "rope_parameters": _rope(values, tensors),
        "tie_word_embeddings": "output.weight" not in tensors,
        "attention_bias": "blk.0.attn_q.bias" in tensors,
        "attention_output_bias": "blk.0.attn_output.bias" in tensors,
        "mlp_bias": "blk.0.ffn_gate.bias" in tensors,
        "dtype": _FILE_TYPES.get(values.get("general.file_type", 0), "bfloat16"),
        "eos_token_id": ends,
    }


def _rope(values: dict[str, Any], tensors: dict[str, Any]) -> dict[str, Any]:
    """The rope parameters; llama3's scaling comes as a tensor of divisors, one per frequency."""
    rope: dict[str, Any] = {"rope_theta": values.get("llama.rope.freq_base", 10000.0)}
    kind = values.get("llama.rope.scaling.type", "none")
    if kind != "none":
        rope["rope_type"] = kind
        rope["factor"] = values["llama.rope.scaling.factor"]
    original = values.get("llama.rope.scaling.original_context_length")
    if kind == "yarn" and original is not None:
        rope["original_max_position_embeddings"] = original
        for name in ("beta_fast", "beta_slow"):
            rope[name] = values.get(f"llama.rope.scaling.yarn_{name}")
    if "rope_freqs.weight" in tensors:
        rope["frequency_factors"] = tensors["rope_freqs.weight"].data.tolist()
    return rope
