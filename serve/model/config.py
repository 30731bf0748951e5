"""ModelConfig: a checkpoint's description; every quirk of config.json is known here. No torch."""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from serve.engine.kv_layout import KVLayout, shard_kv_heads
from serve.model.gguf_header import read_gguf_config

logger = logging.getLogger(__name__)

ARCHITECTURES = {"LlamaForCausalLM": "llama", "MistralForCausalLM": "llama"}
ROPE_TYPES = ("default", "linear", "dynamic", "llama3", "yarn")
DTYPES = ("float32", "bfloat16", "float16")
_ROPE_KEYS = (
    {"rope_type", "type", "rope_theta", "factor", "original_max_position_embeddings"}
    | {"low_freq_factor", "high_freq_factor", "frequency_factors", "partial_rotary_factor"}
    | {"attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate"}
    | {"finetuned"}  # says how the checkpoint was made, nothing about how to run it
)


@dataclass(frozen=True, slots=True)
class RopeConfig:
    """How positions rotate queries and keys."""

    theta: float
    type: str = "default"  # default, linear, dynamic, llama3, yarn
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position_embeddings: int = 0  # context of the pretraining, before scaling
    attention_factor: float | None = None
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True
    frequency_factors: tuple[float, ...] = ()  # divisors, one per frequency (GGUF's rope_freqs)


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """The architecture of one checkpoint, in our own terms."""

    architecture: str  # key of the model registry, e.g. "llama"
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_position_embeddings: int  # the context that can be served, rope scaling included
    rms_norm_eps: float
    rope: RopeConfig
    tie_word_embeddings: bool
    attention_bias: bool  # q, k, v
    attention_output_bias: bool
    mlp_bias: bool
    dtype: str  # of the checkpoint: float32, bfloat16, float16
    eos_token_ids: tuple[int, ...]

    def kv_layout(self, block_size: int, element_bytes: int, tp: int, tp_rank: int) -> KVLayout:
        """The KV cache of one rank of a replica of ``tp`` ranks."""
        heads = shard_kv_heads(self.num_heads, self.num_kv_heads, tp, tp_rank)
        return KVLayout(self.num_layers, block_size, heads, self.head_dim, element_bytes)


def load_model_config(path: str) -> ModelConfig:
    """The description of the checkpoint at ``path``: a directory with config.json, or a .gguf file.

    Raises ``ValueError`` with one line for whatever is missing, malformed or not supported.
    """
    source = Path(path)
    try:
        data = read_gguf_config(source) if source.suffix == ".gguf" else _read_directory(source)
        return _parse(data)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def _read_directory(directory: Path) -> dict[str, Any]:
    """config.json, with the end tokens of generation_config.json where that names any."""
    data = _read_json(directory / "config.json")
    generation = directory / "generation_config.json"
    if generation.exists():
        eos = _read_json(generation).get("eos_token_id")
        data["eos_token_id"] = data.get("eos_token_id") if eos is None else eos
    return data


def _read_json(path: Path) -> dict[str, Any]:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"there is no {path.name}") from None
    except (OSError, ValueError) as error:
        raise ValueError(f"{path.name} cannot be read: {error}") from None
    if not isinstance(data, dict):
        raise ValueError(f"{path.name} is not a JSON object")
    return data


def _parse(data: dict[str, Any]) -> ModelConfig:
    name = _architecture(data)
    mistral = name == "MistralForCausalLM"
    num_heads = _count(data, "num_attention_heads")
    hidden_size = _count(data, "hidden_size")
    head_dim = _head_dim(data, hidden_size, num_heads)
    # Mistral's layers have no biases, whatever the config says; Llama's flag covers all four.
    attention_bias = not mistral and bool(data.get("attention_bias"))
    rope, max_positions = _rope(data, _count(data, "max_position_embeddings", 2048), head_dim)
    return ModelConfig(
        architecture=ARCHITECTURES[name],
        vocab_size=_count(data, "vocab_size"),
        hidden_size=hidden_size,
        intermediate_size=_count(data, "intermediate_size"),
        num_layers=_count(data, "num_hidden_layers"),
        num_heads=num_heads,
        num_kv_heads=_num_kv_heads(data, num_heads, mistral),
        head_dim=head_dim,
        max_position_embeddings=_within_window(data, max_positions) if mistral else max_positions,
        rms_norm_eps=_number(data, "rms_norm_eps", 1e-6),
        rope=rope,
        tie_word_embeddings=bool(data.get("tie_word_embeddings", False)),
        attention_bias=attention_bias,
        attention_output_bias=bool(data.get("attention_output_bias", attention_bias)),
        mlp_bias=not mistral and bool(data.get("mlp_bias")),
        dtype=_dtype(data),
        eos_token_ids=_token_ids(data.get("eos_token_id")),
    )


def _architecture(data: dict[str, Any]) -> str:
    """The one name in ``architectures``, after refusing what would change the numbers."""
    names = data.get("architectures")
    if not isinstance(names, list) or len(names) != 1 or names[0] not in ARCHITECTURES:
        supported = ", ".join(ARCHITECTURES)
        raise ValueError(f"architecture {names} is not supported; supported: {supported}")
    activation = data.get("hidden_act", "silu")
    if activation not in ("silu", "swish"):
        raise ValueError(f"hidden_act {activation!r} is not supported; supported: silu")
    if data.get("quantization_config") is not None:
        raise ValueError("quantization_config is not supported; supported: plain weights, GGUF")
    name: str = names[0]
    return name


def _num_kv_heads(data: dict[str, Any], num_heads: int, mistral: bool) -> int:
    if data.get("num_key_value_heads", 8 if mistral else None) is None:
        return num_heads
    num_kv_heads = _count(data, "num_key_value_heads", 8)
    if num_heads % num_kv_heads:
        raise ValueError(f"{num_heads} query heads do not divide over {num_kv_heads} KV heads")
    return num_kv_heads


def _head_dim(data: dict[str, Any], hidden_size: int, num_heads: int) -> int:
    if data.get("head_dim") is None:
        if hidden_size % num_heads:
            raise ValueError(f"hidden_size {hidden_size} is no multiple of {num_heads} heads")
        head_dim = hidden_size // num_heads
    else:
        head_dim = _count(data, "head_dim")
    if head_dim % 2:
        raise ValueError(f"head_dim {head_dim} is odd; rotary embedding needs an even one")
    return head_dim


def _within_window(data: dict[str, Any], max_positions: int) -> int:
    """Full attention equals sliding-window attention for as long as the window covers it all."""
    if data.get("sliding_window", 4096) is None:
        return max_positions
    window = _count(data, "sliding_window", 4096)
    if window < max_positions:
        logger.warning(
            "context limited to %d tokens instead of %d: the model's attention slides over a "
            "window of that size, and full attention is exact only within it",
            window,
            max_positions,
        )
    return min(window, max_positions)


def _dtype(data: dict[str, Any]) -> str:
    name = str(data.get("dtype") or data.get("torch_dtype") or "float32").removeprefix("torch.")
    if name not in DTYPES:
        raise ValueError(f"dtype {name} is not supported; supported: {', '.join(DTYPES)}")
    return name


def _token_ids(value: Any) -> tuple[int, ...]:
    ids = () if value is None else tuple(value) if isinstance(value, list) else (value,)
    if not all(type(token) is int for token in ids):
        raise ValueError(f"eos_token_id {value!r} is neither a token id nor a list of them")
    return tuple(dict.fromkeys(ids))


# --- rope -----------------------------------------------------------------------------------------


def _rope(data: dict[str, Any], max_positions: int, head_dim: int) -> tuple[RopeConfig, int]:
    """The rotation, and the number of positions it makes usable.

    Both forms are read: ``rope_parameters``, and ``rope_scaling`` beside ``rope_theta``.
    """
    scaling = data.get("rope_scaling") or data.get("rope_parameters") or {}
    if not isinstance(scaling, dict) or set(scaling) - _ROPE_KEYS:
        unknown = sorted(set(scaling) - _ROPE_KEYS) if isinstance(scaling, dict) else scaling
        raise ValueError(f"rope parameters {unknown} are not supported")
    partial = scaling.get("partial_rotary_factor", data.get("partial_rotary_factor"))
    if partial not in (None, 1, 1.0):
        raise ValueError(f"partial_rotary_factor {partial} is not supported; supported: 1.0")
    rope_type = scaling.get("rope_type", scaling.get("type", "default"))
    if rope_type not in ROPE_TYPES:
        supported = ", ".join(ROPE_TYPES)
        raise ValueError(f"rope type {rope_type!r} is not supported; supported: {supported}")
    theta = _number(scaling, "rope_theta", _number(data, "rope_theta", 10000.0))
    original = _original_positions(data, scaling, max_positions)
    factors = tuple(float(factor) for factor in scaling.get("frequency_factors", ()))
    if factors and (rope_type != "default" or len(factors) != head_dim // 2):
        raise ValueError("rope frequency factors fit neither head_dim nor this rope type")
    if rope_type == "default":
        return RopeConfig(theta, frequency_factors=factors), max_positions
    if rope_type in ("linear", "dynamic"):
        # Here max_position_embeddings is the context of the pretraining.
        factor = _number(scaling, "factor")
        rope = RopeConfig(theta, rope_type, factor, original_max_position_embeddings=max_positions)
        return rope, max(max_positions, int(max_positions * factor))
    if rope_type == "llama3":
        return _llama3(scaling, theta, original), max_positions
    rope = _yarn(scaling, theta, original, max_positions)
    return rope, max(max_positions, int(original * rope.factor))


def _original_positions(data: dict[str, Any], scaling: dict[str, Any], max_positions: int) -> int:
    """The pretraining's context; a value beside the rope parameters outranks one in them."""
    key = "original_max_position_embeddings"
    holder = data if data.get(key) is not None else scaling
    return _count(holder, key, max_positions)


def _llama3(scaling: dict[str, Any], theta: float, original: int) -> RopeConfig:
    low, high = _number(scaling, "low_freq_factor"), _number(scaling, "high_freq_factor")
    if high <= low:
        raise ValueError(f"rope high_freq_factor {high} is not above low_freq_factor {low}")
    return RopeConfig(theta, "llama3", _number(scaling, "factor"), low, high, original)


def _yarn(scaling: dict[str, Any], theta: float, original: int, max_positions: int) -> RopeConfig:
    def optional(key: str) -> float | None:
        return None if scaling.get(key) is None else _number(scaling, key)

    return RopeConfig(
        theta,
        "yarn",
        _number(scaling, "factor", max_positions / original),
        original_max_position_embeddings=original,
        attention_factor=optional("attention_factor"),
        beta_fast=optional("beta_fast") or 32.0,
        beta_slow=optional("beta_slow") or 1.0,
        mscale=optional("mscale"),
        mscale_all_dim=optional("mscale_all_dim"),
        truncate=bool(scaling.get("truncate", True)),
    )


# --- checked reading ------------------------------------------------------------------------------


def _count(data: dict[str, Any], key: str, default: int | None = None) -> int:
    value = data.get(key)
    value = default if value is None else value
    if type(value) is not int or value < 1:
        raise ValueError(f"{key} is {value!r}; it must be a positive integer")
    return value


def _number(data: dict[str, Any], key: str, default: float | None = None) -> float:
    value = data.get(key)
    value = default if value is None else value
    if not isinstance(value, int | float) or isinstance(value, bool) or not value > 0:
        raise ValueError(f"{key} is {value!r}; it must be a positive number")
    return float(value)
