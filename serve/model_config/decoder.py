"""Read a decoder's ModelConfig by the key names that most families' config.json shares."""

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
    **overrides: Any,
) -> ModelConfig:
    """Describe a decoder with rotary embedding and a gated feed-forward layer.

    ``num_kv_heads``, ``head_dim``, ``positions`` and ``eps`` are the family's defaults for keys
    that config.json leaves out. ``window`` is the sliding window of all layers. ``rope_options``
    are keyword arguments of ``read_rope``. ``overrides`` are fields of ``ModelConfig`` that replace
    the common ones. Raises ``ValueError`` for a missing or unsupported value.
    """
    num_heads, hidden_size = fields.count("num_attention_heads"), fields.count("hidden_size")
    num_layers = fields.count("num_hidden_layers")
    size = read_head_dim(fields, hidden_size, num_heads, head_dim)
    max_positions = fields.count("max_position_embeddings", positions)
    rope, max_positions = read_rope(fields, max_positions, size, **(rope_options or {}))
    values: dict[str, Any] = {
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
        # A window that covers the whole context is no window.
        "windows": () if window is None or window >= max_positions else (window,) * num_layers,
    }
    if "activation" not in overrides:
        values["activation"] = fields.choice("hidden_act", _SILU, "silu")
    return ModelConfig(**values | overrides)


def _num_kv_heads(fields: Fields, num_heads: int, default: int | None) -> int:
    # An explicit null means multi-head attention, even where the family has a default.
    if fields.is_null("num_key_value_heads") or (
        default is None and fields.get("num_key_value_heads") is None
    ):
        return num_heads
    num_kv_heads = fields.count("num_key_value_heads", default)
    if num_heads % num_kv_heads:
        raise ValueError(f"{num_heads} query heads do not divide over {num_kv_heads} KV heads")
    return num_kv_heads


def read_head_dim(fields: Fields, hidden_size: int, num_heads: int, default: int | None) -> int:
    """Read ``head_dim``, or compute it from the hidden size where neither file nor family has it.

    Raises ``ValueError`` if it is odd, or if ``num_heads`` does not divide the hidden size.
    """
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
    """Return each layer's window from ``layer_types``; the family's ``default`` if it is missing.

    Returns ``()`` if no layer has a window.
    """
    types = fields.get("layer_types", default)
    if not isinstance(types, list) or len(types) != len(default) or set(types) - _ATTENTION_TYPES:
        allowed = " or ".join(sorted(_ATTENTION_TYPES))
        raise ValueError(f"layer_types is {types!r}; it must name {allowed} for each layer")
    windows = tuple(window if kind == "sliding_attention" else None for kind in types)
    return windows if any(windows) else ()


def read_window(fields: Fields, key: str, default: int | None) -> int | None:
    """Read a sliding window; an explicit null means full attention, a missing key ``default``."""
    if fields.is_null(key) or fields.get(key, default) is None:
        return None
    return fields.count(key, default)
