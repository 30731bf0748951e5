"""ModelConfig: both forms of config.json, GGUF headers, and one-line errors."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from transformers import MistralConfig

from serve.model_config.file import load_model_config
from serve.model_config.rope import RopeConfig
from tests.support.checkpoints import smollm2_gguf

LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 100,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
    "torch_dtype": "bfloat16",
    "eos_token_id": 2,
}


def write(path: Path, generation: dict[str, Any] | None = None, **changes: Any) -> str:
    (path / "config.json").write_text(json.dumps(LLAMA | changes))
    if generation is not None:
        (path / "generation_config.json").write_text(json.dumps(generation))
    return str(path)


def test_defaults(tmp_path: Path) -> None:
    config = load_model_config(write(tmp_path))
    assert (config.num_kv_heads, config.head_dim, config.dtype) == (4, 16, "bfloat16")
    assert config.rope == RopeConfig(10000.0)
    assert config.eos_token_ids == (2,)
    assert config.max_position_embeddings == 128
    assert not (config.tie_word_embeddings)
    assert not (config.attention_bias)
    assert not (config.mlp_bias)


def test_end_tokens_come_from_the_generation_config_first(tmp_path: Path) -> None:
    path = write(tmp_path, {"eos_token_id": [7, 8, 7]})
    assert load_model_config(path).eos_token_ids == (7, 8, 2)
    assert load_model_config(write(tmp_path, {})).eos_token_ids == (2,)
    assert load_model_config(write(tmp_path, {}, eos_token_id=None)).eos_token_ids == ()


def test_old_and_new_form_of_rope_parameters_agree(tmp_path: Path) -> None:
    scaling = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    original = {"original_max_position_embeddings": 64}
    old = write(
        tmp_path, rope_theta=5e5, rope_scaling={"rope_type": "llama3", **scaling, **original}
    )
    expected = RopeConfig(5e5, "llama3", 8.0, 1.0, 4.0, 64)
    assert load_model_config(old).rope == expected
    parameters = {"rope_type": "llama3", "rope_theta": 5e5, **scaling, **original}
    assert load_model_config(write(tmp_path, rope_parameters=parameters)).rope == expected
    assert load_model_config(old).max_position_embeddings == 128


@pytest.mark.parametrize(
    ("scaling", "context"),
    [
        ({"type": "linear", "factor": 4.0}, 512),
        ({"type": "dynamic", "factor": 2.0}, 256),
        ({"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}, 128),
        ({"type": "yarn", "factor": 4.0}, 512),
    ],
)
def test_scaling_widens_the_context(tmp_path: Path, scaling: dict[str, Any], context: int) -> None:
    path = write(tmp_path, rope_scaling=scaling)
    assert load_model_config(path).max_position_embeddings == context


def test_mistrals_layers_have_a_window(tmp_path: Path) -> None:
    MistralConfig(
        architectures=["MistralForCausalLM"],
        hidden_size=64,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        sliding_window=96,
    ).save_pretrained(tmp_path)
    config = load_model_config(str(tmp_path))
    assert (config.architecture, config.num_kv_heads) == ("llama", 2)
    assert config.max_position_embeddings == 512
    assert config.windows == (96,) * config.num_layers
    assert config.max_window == 96
    mistral: dict[str, Any] = {"architectures": ["MistralForCausalLM"], "num_key_value_heads": None}
    for window in (None, 128):  # none, and one that covers the whole context
        config = load_model_config(write(tmp_path, **mistral, sliding_window=window))
        assert config.max_position_embeddings == 128
        assert config.max_window is None


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "architecture": ({"architectures": ["BloomForCausalLM"]}, "supported: LlamaForCausalLM"),
    "no architecture": ({"architectures": None}, "architecture None"),
    "activation": ({"hidden_act": "gelu"}, "hidden_act 'gelu'"),
    "rope type": ({"rope_scaling": {"type": "longrope", "factor": 2}}, "supported: default, lin"),
    "rope key": ({"rope_scaling": {"type": "dynamic", "alpha": 2}}, "rope parameters ['alpha']"),
    "rope not an object": ({"rope_scaling": "linear"}, "rope parameters linear"),
    "rope without factor": ({"rope_scaling": {"type": "linear"}}, "factor is None"),
    "partial rotary": ({"partial_rotary_factor": 0.5}, "partial_rotary_factor 0.5"),
    "heads": ({"num_key_value_heads": 3}, "4 query heads do not divide over 3 KV heads"),
    "hidden size": ({"hidden_size": 66}, "hidden_size 66"),
    "head size": ({"head_dim": 15}, "head_dim 15"),
    "type of a number": ({"num_hidden_layers": "two"}, "num_hidden_layers is 'two'"),
    "missing number": ({"vocab_size": None}, "vocab_size is None"),
    "dtype": ({"torch_dtype": "float8_e4m3fn"}, "dtype float8_e4m3fn"),
    "quantisation": ({"quantization_config": {"quant_method": "awq"}}, "quantization_config"),
    "end tokens": ({"eos_token_id": "</s>"}, "eos_token_id '</s>'"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_in_one_line(tmp_path: Path, case: str) -> None:
    changes, message = REFUSED[case]
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        load_model_config(write(tmp_path, **changes))
    assert "\n" not in str(caught.value)
    assert str(tmp_path) in str(caught.value)


@pytest.mark.parametrize("content", [None, "{", "[1]", b"\xff\xfe"])
def test_an_unreadable_directory(tmp_path: Path, content: str | bytes | None) -> None:
    if content is not None:
        data = content if isinstance(content, bytes) else content.encode()
        (tmp_path / "config.json").write_bytes(data)
    with pytest.raises(ValueError, match=r"config\.json") as caught:
        load_model_config(str(tmp_path))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", [None, b"", b"GGUFnonsense", b"GGUF\3\0\0\0" + b"\xff" * 64])
def test_an_unreadable_gguf_file(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "model.gguf"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ValueError, match=r"model\.gguf") as caught:
        load_model_config(str(path))
    assert "\n" not in str(caught.value)


def test_the_configuration_needs_no_torch() -> None:
    code = (
        "import sys; from serve.model_config.file import load_model_config as load; "
        f"config = load({str(smollm2_gguf())!r}); "
        "assert 'torch' not in sys.modules; "
        "assert (config.vocab_size, config.num_layers, config.head_dim) == (49152, 30, 64)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
