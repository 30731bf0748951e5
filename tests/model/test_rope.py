"""Rotary frequencies equal those of transformers, for each type and its options."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

from serve.model.kernels.ops import rotate
from serve.model.rope import RotaryEmbedding, rope_frequencies
from serve.model_config.file import load_model_config
from serve.model_config.rope import RopeConfig
from tests.support.checkpoints import ROPES, write_llama_checkpoint

YARN = ROPES["yarn"]
CASES: dict[str, dict[str, Any]] = {
    **ROPES,
    "yarn with attention_factor": {**YARN, "attention_factor": 0.7},
    "yarn with mscale": {**YARN, "mscale": 0.707, "mscale_all_dim": 1.1},
    "yarn with one mscale": {**YARN, "mscale": 0.707},
    "yarn with betas": {**YARN, "beta_fast": 4.0, "beta_slow": 2.0},
    "yarn not truncated": {**YARN, "truncate": False},
    "yarn of factor 1": {**YARN, "factor": 1.0},
    "llama3 as in 3.1": {**ROPES["llama3"], "original_max_position_embeddings": 8192},
}


def write(path: Any, rope: dict[str, Any]) -> tuple[RopeConfig, LlamaConfig]:
    write_llama_checkpoint(path, seed=0, rope=rope, rope_theta=50000.0, head_dim=64, num_layers=1)
    rope_config = load_model_config(str(path)).rope
    assert rope_config is not None
    return rope_config, LlamaConfig.from_pretrained(path)


@pytest.mark.parametrize("case", CASES)
def test_frequencies_and_scale(case: str, tmp_path: Any) -> None:
    rope, hf_config = write(tmp_path, CASES[case])
    compute = ROPE_INIT_FUNCTIONS.get(
        rope.type, LlamaRotaryEmbedding.compute_default_rope_parameters
    )
    expected, expected_scale = compute(hf_config)
    frequencies, scale = rope_frequencies(rope, 64)
    torch.testing.assert_close(frequencies, expected, rtol=0, atol=0)
    assert scale == pytest.approx(expected_scale, rel=1e-12)


@pytest.mark.parametrize("case", CASES)
def test_rotation(case: str, tmp_path: Any) -> None:
    rope, hf_config = write(tmp_path, CASES[case])
    positions = torch.arange(200)
    x = torch.randn(200, 3, 64, generator=torch.Generator().manual_seed(1))
    cos, sin = LlamaRotaryEmbedding(hf_config)(x, positions[None])
    expected, _ = apply_rotary_pos_emb(x[None], x[None], cos, sin, unsqueeze_dim=2)
    rotated = rotate(x, *RotaryEmbedding(rope, 64, "cpu")(positions))
    torch.testing.assert_close(rotated, expected[0], rtol=0, atol=1e-6)


def test_dynamic_rotates_each_token_as_the_last_of_its_prefix(tmp_path: Any) -> None:
    rope, hf_config = write(tmp_path, {"rope_type": "dynamic", "factor": 3.0})
    hf_config.max_position_embeddings = 16
    rope = RopeConfig(rope.theta, "dynamic", 3.0, original_max_position_embeddings=16)
    cos, sin = RotaryEmbedding(rope, 64, "cpu")(torch.arange(60))
    cos, sin = cos.tile(2), sin.tile(2)  # the reference repeats them for both halves
    reference = LlamaRotaryEmbedding(hf_config)  # sees lengths 1, 2, 3 ...
    for position in range(60):
        expected = reference(torch.zeros(1), torch.tensor([[position]]))
        torch.testing.assert_close(cos[position], expected[0][0, 0], rtol=0, atol=3e-6)
        torch.testing.assert_close(sin[position], expected[1][0, 0], rtol=0, atol=3e-6)


def test_an_unknown_type_is_refused() -> None:
    with pytest.raises(ValueError, match="rope type 'spiral'"):
        rope_frequencies(RopeConfig(10000.0, "spiral"), 64)
