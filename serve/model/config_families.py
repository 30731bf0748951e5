"""What each family calls things in config.json, its defaults and its quirks: one function each."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from serve.model.config import ModelConfig
from serve.model.config_fields import Fields
from serve.model.config_rope import read_rope

_SILU = {"silu": "silu", "swish": "silu"}


def parse_config(data: dict[str, Any]) -> ModelConfig:
    """The description that a config.json's ``data`` gives; ``ValueError`` with one line."""
    names = data.get("architectures")
    if not isinstance(names, list) or len(names) != 1 or names[0] not in FAMILIES:
        supported = ", ".join(FAMILIES)
        raise ValueError(f"architecture {names} is not supported; supported: {supported}")
    if data.get("quantization_config") is not None:
        raise ValueError("quantization_config is not supported; supported: plain weights, GGUF")
    return FAMILIES[names[0]](Fields(data))


def _llama(fields: Fields) -> ModelConfig:
    # Llama's flag covers all four projections.
    bias = fields.flag("attention_bias")
    return _decoder(
        "llama",
        fields,
        attention_bias=bias,
        attention_output_bias=fields.flag("attention_output_bias", bias),
        mlp_bias=fields.flag("mlp_bias"),
    )


def _mistral(fields: Fields) -> ModelConfig:
    """No biases, whatever the config says; a window unless it is null, also where it is missing."""
    return _decoder("llama", fields, num_kv_heads=8, window=_window(fields, "sliding_window", 4096))


def _smollm3(fields: Fields) -> ModelConfig:
    """Every fourth layer does not rotate; a window would be on those."""
    num_layers = fields.count("num_hidden_layers")
    interval = fields.count("no_rope_layer_interval", 4)
    rotated = fields.get("no_rope_layers")
    if rotated is None:
        rotated = [int((layer + 1) % interval != 0) for layer in range(num_layers)]
    if not isinstance(rotated, list) or len(rotated) != num_layers:
        raise ValueError(f"no_rope_layers is {rotated!r}; it must have a number for each layer")
    fields.only("use_sliding_window", False)
    fields.only("layer_types", ["full_attention"] * num_layers)
    bias = fields.flag("attention_bias")
    return _decoder(
        "llama",
        fields,
        num_kv_heads=4,
        attention_bias=bias,
        attention_output_bias=bias,
        mlp_bias=fields.flag("mlp_bias"),
        tie_word_embeddings=fields.flag("tie_word_embeddings", True),
        unrotated_layers=frozenset(layer for layer, on in enumerate(rotated) if not on),
    )


FAMILIES: dict[str, Callable[[Fields], ModelConfig]] = {
    "LlamaForCausalLM": _llama,
    "MistralForCausalLM": _mistral,
    "SmolLM3ForCausalLM": _smollm3,
}


# --- what most families share ---------------------------------------------------------------------


def _decoder(
    architecture: str,
    fields: Fields,
    *,
    num_kv_heads: int | None = None,
    head_dim: int | None = None,
    window: int | None = None,
    rope_options: dict[str, Any] | None = None,
    **changes: Any,
) -> ModelConfig:
    """A decoder of rotated queries and keys and a gated feed-forward layer, by the usual names.

    ``num_kv_heads`` and ``head_dim``: what the family takes where nothing is said; ``window``: that
    of all layers.
    """
    num_heads, hidden_size = fields.count("num_attention_heads"), fields.count("hidden_size")
    num_layers = fields.count("num_hidden_layers")
    size = _head_dim(fields, hidden_size, num_heads, head_dim)
    max_positions = fields.count("max_position_embeddings", 2048)
    rope, max_positions = read_rope(fields, max_positions, size, **(rope_options or {}))
    described: dict[str, Any] = {
        "architecture": architecture,
        "vocab_size": fields.count("vocab_size"),
        "hidden_size": hidden_size,
        "intermediate_size": fields.count("intermediate_size"),
        "num_layers": num_layers,
        "num_heads": num_heads,
        "num_kv_heads": _num_kv_heads(fields, num_heads, num_kv_heads),
        "head_dim": size,
        "max_position_embeddings": max_positions,
        "norm_eps": fields.number("rms_norm_eps", 1e-6),
        "rope": rope,
        "tie_word_embeddings": fields.flag("tie_word_embeddings"),
        "dtype": fields.dtype(),
        "eos_token_ids": fields.token_ids("eos_token_id"),
        "windows": () if window is None or window >= max_positions else (window,) * num_layers,
    }
    if "activation" not in changes:
        described["activation"] = fields.choice("hidden_act", _SILU, "silu")
    return ModelConfig(**described | changes)


def _num_kv_heads(fields: Fields, num_heads: int, default: int | None) -> int:
    if fields.is_null("num_key_value_heads") or (
        default is None and fields.get("num_key_value_heads") is None
    ):
        return num_heads
    num_kv_heads = fields.count("num_key_value_heads", default)
    if num_heads % num_kv_heads:
        raise ValueError(f"{num_heads} query heads do not divide over {num_kv_heads} KV heads")
    return num_kv_heads


def _head_dim(fields: Fields, hidden_size: int, num_heads: int, default: int | None) -> int:
    if fields.get("head_dim", default) is None:
        if hidden_size % num_heads:
            raise ValueError(f"hidden_size {hidden_size} is no multiple of {num_heads} heads")
        head_dim = hidden_size // num_heads
    else:
        head_dim = fields.count("head_dim", default)
    if head_dim % 2:
        raise ValueError(f"head_dim {head_dim} is odd; rotary embedding needs an even one")
    return head_dim


def _window(fields: Fields, key: str, default: int | None) -> int | None:
    """A window that null switches off."""
    if fields.is_null(key) or fields.get(key, default) is None:
        return None
    return fields.count(key, default)
