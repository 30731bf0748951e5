"""Weights from GGUF files: names, order of rows, parts for each rank, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from torch import Tensor

from serve.model.layers import Shard, parameter_shards
from serve.model.rope import rope_frequencies
from serve.model.weights.checkpoint import open_checkpoint, take
from serve.model.weights.load import load_weights
from serve.model_config.file import load_model_config
from tests.model.test_weights import part_of
from tests.support.checkpoints import load_reference, smollm2_gguf, write_llama_checkpoint

torch.set_num_threads(1)

Q8 = gguf.GGMLQuantizationType.Q8_0
GGUF_NAMES = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, 4)


def permute(rows: Tensor, num_heads: int) -> Tensor:
    """Order query and key rows as GGUF converters do: dimension i next to i + head_dim / 2."""
    return rows.view(num_heads, 2, -1, *rows.shape[1:]).transpose(1, 2).reshape(rows.shape)


def write_gguf(path: Path, source: Path, **extra: Any) -> dict[str, Tensor]:
    """Write ``source`` as a GGUF file, matrices in Q8_0; return the weights it must load as."""
    model = load_reference(source)
    config = model.config
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(20000.0)
    writer.add_eos_token_id(3)
    writer.add_eot_token_id(5)
    for key, value in extra.get("keys", {}).items():
        writer.add_key_value(key, value, gguf.GGUFValueType.FLOAT32)
    expected = {}
    for name, tensor in model.state_dict().items():
        heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
        count = next((count for key, count in heads.items() if key in name), None)
        stored = (tensor if count is None else permute(tensor, count)).numpy()
        target = GGUF_NAMES.get_name(name, try_suffixes=(".weight", ".bias"))
        if tensor.ndim == 2:
            raw = gguf.quantize(stored, Q8)
            writer.add_tensor(target, raw, raw_dtype=Q8)
            # Q8_0 quantises each row by itself, so the order of rows does not change values.
            exact = gguf.dequantize(gguf.quantize(tensor.numpy(), Q8), Q8)
            expected[name] = torch.from_numpy(exact)
        else:
            writer.add_tensor(target, stored)
            expected[name] = tensor
    if "rope_freqs" in extra:
        writer.add_tensor("rope_freqs.weight", np.array(extra["rope_freqs"], dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return expected


@pytest.mark.parametrize("size", [1, 2, 3])
def test_gguf_parts(tmp_path: Path, size: int) -> None:
    """Rows and columns that begin and end within a quantisation block (32 elements)."""
    source = write_llama_checkpoint(
        tmp_path / "hf",
        seed=13,
        num_heads=6,
        num_kv_heads=2,
        head_dim=16,
        intermediate_size=160,
        vocab_size=101,
        attention_bias=True,
    )
    path = tmp_path / "model.gguf"
    expected = write_gguf(path, source, rope_freqs=[1.0 + i for i in range(8)])
    config = load_model_config(str(path))
    assert config.eos_token_ids == (3, 5)
    assert config.attention_bias
    assert config.head_dim == 16
    assert config.rope is not None
    assert config.rope.frequency_factors == tuple(1.0 + i for i in range(8))
    for rank in range(size):
        part = part_of(config, rank, size)
        load_weights(part, str(path), "gguf", seed=0)
        for name, parameter, shard in parameter_shards(part):
            assert torch.equal(parameter, take(expected[name], shard)), (rank, name)


def test_gguf_frequency_factors_divide(tmp_path: Path) -> None:
    source = write_llama_checkpoint(tmp_path / "hf", seed=14)
    factors = [2.0, 1.0, 4.0, 8.0, 1.0, 1.0, 1.0, 2.0]
    write_gguf(tmp_path / "model.gguf", source, rope_freqs=factors)
    write_gguf(tmp_path / "plain.gguf", source)
    scaled = load_model_config(str(tmp_path / "model.gguf")).rope
    plain = load_model_config(str(tmp_path / "plain.gguf")).rope
    assert scaled is not None
    assert plain is not None
    ratio = rope_frequencies(plain, 16)[0] / rope_frequencies(scaled, 16)[0]
    assert ratio.tolist() == pytest.approx(factors)


def test_unsupported_gguf_keys_are_refused(tmp_path: Path) -> None:
    source = write_llama_checkpoint(tmp_path / "hf", seed=15)
    path = tmp_path / "model.gguf"
    write_gguf(path, source, keys={"llama.rope.scaling.attn_factor": 0.5})
    with pytest.raises(ValueError, match=r"GGUF key llama\.rope\.scaling\.attn_factor"):
        load_model_config(str(path))
    write_gguf(path, source, rope_freqs=[1.0] * 5)
    with pytest.raises(ValueError, match="frequency factors"):
        load_model_config(str(path))


def test_gguf_leftovers_are_named(tmp_path: Path) -> None:
    """The file has more layers than the config."""
    source = write_llama_checkpoint(tmp_path / "hf", seed=16, num_layers=2)
    smaller = write_llama_checkpoint(tmp_path / "smaller", seed=16, num_layers=1)
    path = tmp_path / "model.gguf"
    write_gguf(path, source)
    config = load_model_config(str(smaller))
    with pytest.raises(ValueError, match=r"left over: model\.layers\.1\.input_layernorm\.weight"):
        load_weights(part_of(config, 0, 1), str(path), "auto", seed=0)


def test_real_gguf_in_three_parts() -> None:
    """SmolLM2's nine heads and three KV heads over three ranks."""
    path = str(smollm2_gguf())
    config, checkpoint = load_model_config(path), open_checkpoint(path, "auto")
    names = {"self_attn.k_proj.weight", "self_attn.o_proj.weight", "mlp.down_proj.weight"}
    for rank in range(3):
        for name, _, shard in parameter_shards(part_of(config, rank, 3)):
            if name.startswith("model.layers.7.") and name.split(".", 3)[3] in names:
                whole = checkpoint.read(name, Shard.whole(*shard.shape))
                assert torch.equal(checkpoint.read(name, shard), take(whole, shard))
