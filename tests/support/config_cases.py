"""Configurations of a tiny model, parsed from a command line, for the tests of the options."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from serve.config.server import ConfigError, ServerConfig, parse_args


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """Make a model with 8 query heads and 128 positions, and with empty weights and tokenizer."""
    folder = tmp_path / "tiny-llama"
    folder.mkdir()
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": 64,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "max_position_embeddings": 128,
        "rms_norm_eps": 1e-5,
        "torch_dtype": "float32",
        "eos_token_id": 1,
    }
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "model.safetensors").touch()
    (folder / "tokenizer.json").write_text("{}")
    return folder


def parse(model: Path, text: str = "", world_size: int = 2) -> ServerConfig:
    return parse_args(["--model", str(model), *text.split()], world_size)


def refusal(model: Path, text: str, world_size: int = 2) -> str:
    with pytest.raises(ConfigError) as caught:
        parse(model, text, world_size)
    message = str(caught.value)
    assert message
    assert "\n" not in message
    return message
