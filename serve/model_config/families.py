"""Read config.json of each family: its key names, defaults and quirks, one function per family.

A new family adds one function here and one entry in ``FAMILIES``. Keys that change results and are
not supported are refused with ``Fields.only``, so that no checkpoint is silently served wrong.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from serve.model_config.config import ModelConfig
from serve.model_config.decoder import (
    describe_decoder,
    layers_of,
    read_head_dim,
    read_window,
    windows_by_type,
)
from serve.model_config.fields import Fields
from serve.model_config.rope import read_rope

_GELU_TANH = {"gelu_pytorch_tanh": "gelu_tanh", "gelu_new": "gelu_tanh"}
_MLP_ACTIVATIONS = _GELU_TANH | {"gelu": "gelu", "relu": "relu"}


def parse_config(data: dict[str, Any]) -> ModelConfig:
    """Parse the content of config.json. Raises ``ValueError`` with one line if unsupported."""
    names = data.get("architectures")
    if not isinstance(names, list) or len(names) != 1 or names[0] not in FAMILIES:
        supported = ", ".join(FAMILIES)
        raise ValueError(f"architecture {names} is not supported; supported: {supported}")
    if data.get("quantization_config") is not None:
        raise ValueError("quantization_config is not supported; supported: plain weights, GGUF")
    fields = Fields(data)
    fields.only("is_causal", True)  # false for embedding models, which also attend to later tokens
    return FAMILIES[names[0]](fields)


def _llama(fields: Fields) -> ModelConfig:
    # Llama's flag covers all four projections (q, k, v, o).
    bias = fields.flag("attention_bias")
    return describe_decoder(
        "llama",
        fields,
        attention_bias=bias,
        attention_output_bias=fields.flag("attention_output_bias", bias),
        mlp_bias=fields.flag("mlp_bias"),
    )


def _mistral(fields: Fields) -> ModelConfig:
    """Read Mistral: no biases, and a default window that only an explicit null switches off."""
    window = read_window(fields, "sliding_window", 4096)
    return describe_decoder("llama", fields, num_kv_heads=8, positions=131072, window=window)


def _smollm3(fields: Fields) -> ModelConfig:
    """Read SmolLM 3: by default every fourth layer is not rotated; windows are refused."""
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
    return describe_decoder(
        "llama",
        fields,
        num_kv_heads=4,
        positions=32768,
        rope_options={"theta": 2e6},
        attention_bias=bias,
        attention_output_bias=bias,
        mlp_bias=fields.flag("mlp_bias"),
        tie_word_embeddings=fields.flag("tie_word_embeddings", True),
        unrotated_layers=frozenset(layer for layer, on in enumerate(rotated) if not on),
    )


def _qwen2(fields: Fields) -> ModelConfig:
    """Read Qwen 2: q, k and v have biases; a window, if any, is on the last layers only."""
    windows = _qwen_windows(fields)
    return describe_decoder("llama", fields, positions=32768, attention_bias=True, windows=windows)


def _qwen3(fields: Fields) -> ModelConfig:
    """Read Qwen 3: queries and keys are normed; ``head_dim`` is 128 by default."""
    bias = fields.flag("attention_bias")
    return describe_decoder(
        "llama",
        fields,
        head_dim=128,
        positions=32768,
        attention_bias=bias,
        attention_output_bias=bias,
        qk_norm=True,
        windows=_qwen_windows(fields),
    )


def _qwen_windows(fields: Fields) -> tuple[int | None, ...]:
    num_layers = fields.count("num_hidden_layers")
    window = (
        read_window(fields, "sliding_window", 4096) if fields.flag("use_sliding_window") else None
    )
    first = fields.get("max_window_layers", 28)
    types = [
        "sliding_attention" if layer >= first else "full_attention" for layer in range(num_layers)
    ]
    return windows_by_type(fields, window, types)


def _phi3(fields: Fields) -> ModelConfig:
    """Read Phi-3 and Phi-4: "su" and "yarn" are old names of LongRoPE; a head may rotate partly."""
    scaling = fields.get("rope_scaling") or fields.get("rope_parameters", {})
    if isinstance(scaling, dict):
        scaling = dict[str, Any](original_max_position_embeddings=4096) | scaling
        key = "rope_type" if "rope_type" in scaling else "type"
        if scaling.get(key) in ("su", "yarn"):
            scaling[key] = "longrope"
    rope = {"parameters": scaling, "types": ("default", "longrope"), "partial": True}
    window = read_window(fields, "sliding_window", None)
    return describe_decoder(
        "phi3", fields, positions=4096, eps=1e-5, window=window, rope_options=rope
    )


def _gemma2(fields: Fields) -> ModelConfig:
    """Read Gemma 2: every other layer has a window, beginning with the first."""
    types = ["full_attention" if layer % 2 else "sliding_attention" for layer in layers_of(fields)]
    cap = _softcap(fields, "attn_logit_softcapping", 50.0)
    return _gemma(fields, types, attention_softcap=cap, logit_softcap=30.0)


def _gemma3(fields: Fields) -> ModelConfig:
    """Read Gemma 3: five of six layers have a window and their own rotation; q and k are normed.

    ``attn_logit_softcapping`` belongs to Gemma 2. A Gemma 3 config may contain it, but the model
    does not cap its attention scores.
    """
    pattern = fields.count("sliding_window_pattern", 6)
    types = [
        "sliding_attention" if (i + 1) % pattern else "full_attention" for i in layers_of(fields)
    ]
    size, positions = fields.count("head_dim", 256), fields.count("max_position_embeddings", 131072)
    parameters = fields.get("rope_parameters", {})
    kinds = {"full_attention", "sliding_attention"}
    if not isinstance(parameters, dict) or set(parameters) - kinds:
        raise ValueError(f"rope_parameters {parameters} has other keys than {sorted(kinds)}")
    scaling = parameters.get("full_attention") or fields.get("rope_scaling", {})
    local_scaling = parameters.get("sliding_attention", {})
    theta = fields.number("rope_local_base_freq", 10000.0)
    local, _ = read_rope(Fields({}), positions, size, theta=theta, parameters=local_scaling)
    # max_position_embeddings already includes the scaling, so the scaled length is ignored.
    rope, _ = read_rope(fields, positions, size, theta=1e6, parameters=scaling)
    return _gemma(
        fields, types, qk_norm=True, rope=rope, local_rope=local, max_position_embeddings=positions
    )


def _gemma(
    fields: Fields,
    types: list[str],
    *,
    logit_softcap: float | None = None,
    **overrides: Any,
) -> ModelConfig:
    fields.only("use_bidirectional_attention", False)
    window = fields.count("sliding_window", 4096)
    hidden_size = fields.count("hidden_size")
    bias = fields.flag("attention_bias")
    return describe_decoder(
        "gemma",
        fields,
        num_kv_heads=4,
        head_dim=256,
        positions=8192,
        rope_options={"parameters": {}} if "rope" in overrides else None,
        windows=windows_by_type(fields, window, types),
        activation=fields.choice("hidden_activation", _GELU_TANH, "gelu_pytorch_tanh"),
        tie_word_embeddings=fields.flag("tie_word_embeddings", True),
        attention_bias=bias,
        attention_output_bias=bias,
        attention_scale=fields.number("query_pre_attn_scalar", 256) ** -0.5,
        logit_softcap=_softcap(fields, "final_logit_softcapping", logit_softcap),
        embedding_scale=hidden_size**0.5,
        **overrides,
    )


def _softcap(fields: Fields, key: str, default: float | None) -> float | None:
    """Read a soft cap; an explicit null means none, a missing key ``default``."""
    if fields.is_null(key) or fields.get(key, default) is None:
        return None
    return fields.number(key, default)


def _internlm2(fields: Fields) -> ModelConfig:
    return describe_decoder("internlm2", fields, attention_bias=fields.flag("bias"))


def _gpt2(fields: Fields) -> ModelConfig:
    """Read GPT-2: its own key names, and multi-head attention (as many KV heads as heads)."""
    fields.only("scale_attn_weights", True)
    fields.only("scale_attn_by_inverse_layer_idx", False)
    fields.only("add_cross_attention", False)
    hidden_size, num_heads = fields.count("n_embd", 768), fields.count("n_head", 12)
    return ModelConfig(
        architecture="gpt2",
        vocab_size=fields.count("vocab_size", 50257),
        hidden_size=hidden_size,
        intermediate_size=fields.count("n_inner", 4 * hidden_size),
        num_layers=fields.count("n_layer", 12),
        num_heads=num_heads,
        num_kv_heads=num_heads,
        head_dim=read_head_dim(fields, hidden_size, num_heads, None),
        max_position_embeddings=fields.count("n_positions", 1024),
        norm_eps=fields.number("layer_norm_epsilon", 1e-5),
        rope=None,
        tie_word_embeddings=fields.flag("tie_word_embeddings", True),
        dtype=fields.dtype(),
        eos_token_ids=fields.token_ids("eos_token_id"),
        activation=fields.choice("activation_function", _MLP_ACTIVATIONS, "gelu_new"),
    )


def _opt(fields: Fields) -> ModelConfig:
    """Read OPT: learned positions; OPT-350m has narrow embeddings and norms after each sublayer."""
    fields.only("enable_bias", True)
    fields.only("layer_norm_elementwise_affine", True)
    hidden_size, num_heads = fields.count("hidden_size"), fields.count("num_attention_heads")
    embedding_size = fields.count("word_embed_proj_dim", hidden_size)
    norms_first = fields.flag("do_layer_norm_before", True)
    return ModelConfig(
        architecture="opt",
        vocab_size=fields.count("vocab_size"),
        hidden_size=hidden_size,
        intermediate_size=fields.count("ffn_dim"),
        num_layers=fields.count("num_hidden_layers"),
        num_heads=num_heads,
        num_kv_heads=num_heads,
        head_dim=read_head_dim(fields, hidden_size, num_heads, None),
        max_position_embeddings=fields.count("max_position_embeddings", 2048),
        norm_eps=1e-5,
        rope=None,
        tie_word_embeddings=fields.flag("tie_word_embeddings", True),
        dtype=fields.dtype(),
        eos_token_ids=fields.token_ids("eos_token_id"),
        activation=fields.choice("activation_function", _MLP_ACTIVATIONS, "relu"),
        embedding_size=None if embedding_size == hidden_size else embedding_size,
        norms_first=norms_first,
        has_final_norm=norms_first and not fields.flag("_remove_final_layer_norm"),
    )


FAMILIES: dict[str, Callable[[Fields], ModelConfig]] = {
    "LlamaForCausalLM": _llama,
    "MistralForCausalLM": _mistral,
    "SmolLM3ForCausalLM": _smollm3,
    "Qwen2ForCausalLM": _qwen2,
    "Qwen3ForCausalLM": _qwen3,
    "Phi3ForCausalLM": _phi3,
    "Gemma2ForCausalLM": _gemma2,
    "Gemma3ForCausalLM": _gemma3,
    "InternLM2ForCausalLM": _internlm2,
    "GPT2LMHeadModel": _gpt2,
    "OPTForCausalLM": _opt,
}
