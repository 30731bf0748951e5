"""The description of a decoder by the names that most families' config.json has in common."""

from __future__ import annotations

from typing import Any

from serve.model_config.config import ModelConfig
from serve.model_config.fields import Fields
from serve.model_config.rope import read_rope

_SILU = {"silu": "silu", "swish": "silu"}
_ATTENTION_TYPES = {"full_attention", "sliding_attention"}


def describe_decoder(
    architecture: str,
    fields: Fields,
    *,
    num_kv_heads: int | None = None,
    head_dim: int | None = None,
    positions: int = 2048,
    eps: float = 1e-6,
    window: int | None = None,
    rope_options: dict[str, Any] | None = None,
    **changes: Any,
) -> ModelConfig:
    """A decoder of rotated queries and keys and a gated feed-forward layer, by the usual names.

    ``num_kv_heads``, ``head_dim``, ``positions`` and ``eps``: what the family takes where nothing
    is said; ``window``: that of all layers.
    """
    num_heads, hidden_size = fields.count("num_attention_heads"), fields.count("hidden_size")
    num_layers = fields.count("num_hidden_layers")
    size = read_head_dim(fields, hidden_size, num_heads, head_dim)
    max_positions = fields.count("max_position_embeddings", positions)
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
        "norm_eps": fields.number("rms_norm_eps", eps),
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


def read_head_dim(fields: Fields, hidden_size: int, num_heads: int, default: int | None) -> int:
    if fields.get("head_dim", default) is None:
        if hidden_size % num_heads:
            raise ValueError(f"hidden_size {hidden_size} is no multiple of {num_heads} heads")
        head_dim = hidden_size // num_heads
    else:
        head_dim = fields.count("head_dim", default)
    if head_dim % 2:
        raise ValueError(f"head_dim {head_dim} is odd; rotary embedding needs an even one")
    return head_dim


def layers_of(fields: Fields) -> range:
    return range(fields.count("num_hidden_layers"))


def windows_by_type(
    fields: Fields, window: int | None, default: list[str]
) -> tuple[int | None, ...]:
    """The window of each layer, by ``layer_types`` or what the family takes for them."""
    types = fields.get("layer_types", default)
    if not isinstance(types, list) or len(types) != len(default) or set(types) - _ATTENTION_TYPES:
        raise ValueError(f"layer_types is {types!r}; one of {sorted(_ATTENTION_TYPES)} a layer")
    windows = tuple(window if kind == "sliding_attention" else None for kind in types)
    return windows if any(windows) else ()


def read_window(fields: Fields, key: str, default: int | None) -> int | None:
    """A window that null switches off."""
    if fields.is_null(key) or fields.get(key, default) is None:
        return None
    return fields.count(key, default)
