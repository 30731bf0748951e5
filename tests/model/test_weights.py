"""Weights: every tensor is accounted for, a rank reads its shard alone, errors are one line."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from serve.comm.tensor_parallel import TensorParallel
from serve.model.layers import ParallelLMHead, Placement, Range, parameter_shards
from serve.model.registry import build_model
from serve.model.weights.checkpoint import open_checkpoint, take
from serve.model.weights.load import load_weights
from serve.model_config.config import ModelConfig
from serve.model_config.file import load_model_config
from tests.support.checkpoints import load_reference, write_llama_checkpoint

torch.set_num_threads(1)


def build(path: Path, load_format: str = "auto", seed: int = 0, **options: Any) -> nn.Module:
    model = build_model(load_model_config(str(path)), TensorParallel(0, 1), torch.float32, "cpu")
    load_weights(model, str(path), load_format, seed, **options)
    return model


def part_of(config: ModelConfig, rank: int, size: int) -> nn.Module:
    """Build one rank's model. It does not communicate, so it needs no process group."""
    tp = object.__new__(TensorParallel)
    for name, value in (("rank", rank), ("size", size), ("group", None)):
        object.__setattr__(tp, name, value)
    return build_model(config, tp, torch.float32, "cpu")


def fault(path: Path, load_format: str = "auto") -> str:
    """Return the message with which loading fails: one line that names the path."""
    with pytest.raises(ValueError, match=re.escape(str(path))) as caught:
        build(path, load_format)
    message = str(caught.value)
    assert "\n" not in message
    return message


def rewrite(path: Path, change: Any) -> None:
    tensors = load_file(path / "model.safetensors")
    change(tensors)
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})


def test_faults_are_named_together(tmp_path: Path) -> None:
    write_llama_checkpoint(tmp_path, seed=1)

    def change(tensors: dict[str, Tensor]) -> None:
        del tensors["model.layers.1.mlp.up_proj.weight"]
        tensors["model.layers.2.mlp.up_proj.weight"] = torch.zeros(2)
        tensors["model.norm.weight"] = torch.zeros(65)
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.zeros(8)  # an old buffer

    rewrite(tmp_path, change)
    message = fault(tmp_path)
    assert "missing: model.layers.1.mlp.up_proj.weight;" in message
    assert "left over: model.layers.2.mlp.up_proj.weight;" in message
    assert "model.norm.weight is [65] instead of [64]" in message
    assert "inv_freq" not in message


def test_a_tied_head_may_be_stored_but_not_differ(tmp_path: Path) -> None:
    write_llama_checkpoint(tmp_path, seed=2, tie=True)
    embedding = load_file(tmp_path / "model.safetensors")["model.embed_tokens.weight"]
    rewrite(tmp_path, lambda tensors: tensors.update({"lm_head.weight": embedding.clone()}))
    model = build(tmp_path)
    named = dict(model.named_parameters(remove_duplicate=False))
    assert named["lm_head.weight"] is named["model.embed_tokens.weight"]
    rewrite(tmp_path, lambda tensors: tensors.update({"lm_head.weight": embedding + 1}))
    assert "lm_head.weight is tied" in fault(tmp_path)


def test_a_tied_tensor_may_be_stored_under_either_name(tmp_path: Path) -> None:
    """For example as the head alone, where transformers looks, too."""
    write_llama_checkpoint(tmp_path, seed=2, tie=True)
    expected = build(tmp_path).state_dict()

    def rename(tensors: dict[str, Tensor]) -> None:
        tensors["lm_head.weight"] = tensors.pop("model.embed_tokens.weight")

    rewrite(tmp_path, rename)
    model = build(tmp_path).state_dict()
    assert all(torch.equal(model[name], expected[name]) for name in expected)
    reference = load_reference(tmp_path).state_dict()
    assert torch.equal(model["lm_head.weight"], reference["model.embed_tokens.weight"])
    rewrite(tmp_path, lambda tensors: tensors.pop("lm_head.weight"))
    assert "missing: model.embed_tokens.weight" in fault(tmp_path)


def test_an_untied_head_must_be_there(tmp_path: Path) -> None:
    write_llama_checkpoint(tmp_path, seed=3)
    rewrite(tmp_path, lambda tensors: tensors.pop("lm_head.weight"))
    assert "missing: lm_head.weight" in fault(tmp_path)


def test_a_tensor_by_its_long_and_its_short_name_is_left_over(tmp_path: Path) -> None:
    write_llama_checkpoint(tmp_path, seed=3)
    rewrite(tmp_path, lambda tensors: tensors.update({"norm.weight": torch.ones(64)}))
    assert "left over: norm.weight" in fault(tmp_path)

    def shorten(tensors: dict[str, Tensor]) -> None:
        for name in list(tensors):
            tensors[name.removeprefix("model.")] = tensors.pop(name)
        tensors["layers.2.mlp.up_proj.weight"] = torch.zeros(2)
        del tensors["embed_tokens.weight"]

    rewrite(tmp_path, shorten)
    message = fault(tmp_path)
    assert "missing: model.embed_tokens.weight; left over: layers.2.mlp.up_proj.weight" in message


@pytest.mark.parametrize("size", [0, 5, 200, -7])
def test_a_truncated_safetensors_file(tmp_path: Path, size: int) -> None:
    file = write_llama_checkpoint(tmp_path, seed=4) / "model.safetensors"
    file.write_bytes(file.read_bytes()[:size])
    assert "model.safetensors is not a readable safetensors file" in fault(tmp_path)


@pytest.mark.parametrize("content", [b"", b"junk", b"PK\3\4junk"])
def test_a_corrupt_torch_file(tmp_path: Path, content: bytes) -> None:
    write_llama_checkpoint(tmp_path, seed=5, format="pt")
    (tmp_path / "pytorch_model.bin").write_bytes(content)
    assert "pytorch_model.bin is not a readable torch checkpoint" in fault(tmp_path)


class Evil:
    """Runs code when unpickled by a loader that allows it."""

    def __reduce__(self) -> Any:
        return (print, ("executed",))


def test_no_pickled_code_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_llama_checkpoint(tmp_path, seed=6, format="pt")
    torch.save({"model.norm.weight": Evil()}, tmp_path / "pytorch_model.bin")
    fault(tmp_path)
    assert "executed" not in capsys.readouterr().out


def test_broken_indices(tmp_path: Path) -> None:
    path = write_llama_checkpoint(tmp_path, seed=7, sharded=True)
    index = path / "model.safetensors.index.json"
    good = index.read_text()
    index.write_text(good.replace("model.norm.weight", "model.norm.other"))
    assert "lacks tensors that its index lists: model.norm.other" in fault(path)
    index.write_text(good.replace("model-00001", "../model-00001"))
    assert "is not a file name" in fault(path)
    index.write_text(good.replace("model-00001", "model-00009"))
    assert "lists files that are missing: model-00009" in fault(path)
    index.write_text("{}")
    assert "is not a readable index" in fault(path)


@pytest.mark.parametrize("load_format", ["safetensors", "pt"])
def test_shards_without_an_index(tmp_path: Path, load_format: Any) -> None:
    write_llama_checkpoint(tmp_path, seed=7, sharded=True, format=load_format)
    expected = build(tmp_path).state_dict()
    [index] = tmp_path.glob("*.index.json")
    index.unlink()
    model = build(tmp_path).state_dict()
    assert all(torch.equal(model[name], expected[name]) for name in expected)

    first, second, *_ = sorted(tmp_path.glob("*-of-*"))
    content = first.read_bytes()
    first.write_bytes(second.read_bytes())
    assert "repeats tensors of another shard" in fault(tmp_path)
    first.write_bytes(content)
    second.unlink()
    assert f"lacks shards of its weights: {second.name}" in fault(tmp_path)


def test_formats_and_places_that_do_not_fit(tmp_path: Path) -> None:
    path = write_llama_checkpoint(tmp_path, seed=8)
    assert "no pytorch_model.bin" in fault(path, "pt")
    assert "cannot be loaded as gguf" in fault(path, "gguf")
    (path / "model.safetensors").unlink()
    assert "no model.safetensors" in fault(path)
    with pytest.raises(ValueError, match="load format 'onnx' is not supported"):
        open_checkpoint(str(path), "onnx")


def test_progress_counts_tensors(tmp_path: Path) -> None:
    path = write_llama_checkpoint(tmp_path, seed=9)
    calls: list[tuple[int, int]] = []
    model = build(path, progress=lambda done, total: calls.append((done, total)))
    total = len(list(model.parameters()))
    assert calls == [(number, total) for number in range(1, total + 1)]


# --- shards ---------------------------------------------------------------------------------------

SPLITS = {  # sizes that do not divide over the ranks
    2: {"num_heads": 4, "num_kv_heads": 1, "intermediate_size": 97, "vocab_size": 101},
    3: {"num_heads": 6, "num_kv_heads": 2, "intermediate_size": 98, "vocab_size": 100},
    4: {"num_heads": 4, "num_kv_heads": 2, "intermediate_size": 5, "vocab_size": 5},
}


@pytest.mark.parametrize("size", SPLITS)
@pytest.mark.parametrize("load_format", ["safetensors", "pt", "dummy"])
def test_shards_equal_parts_of_the_whole(tmp_path: Path, size: int, load_format: str) -> None:
    file_format: Any = "safetensors" if load_format == "dummy" else load_format
    options = SPLITS[size] | {"attention_bias": True, "mlp_bias": True, "format": file_format}
    path = write_llama_checkpoint(tmp_path, seed=10, **options)
    whole = build(path, load_format).state_dict()
    config = load_model_config(str(path))
    for rank in range(size):
        part = part_of(config, rank, size)
        load_weights(part, str(path), load_format, seed=0)
        for name, parameter, shard in parameter_shards(part):
            assert torch.equal(parameter, take(whole[name], shard)), (rank, name)


def test_every_row_is_on_some_rank() -> None:
    for total, size in [(10, 3), (5, 4), (3, 4), (8, 2)]:
        parts = [Range.even(total, rank_of(rank, size)).ranges[0] for rank in range(size)]
        assert [row for start, stop in parts for row in range(start, stop)] == list(range(total))


def rank_of(rank: int, size: int) -> TensorParallel:
    tp = object.__new__(TensorParallel)
    for name, value in (("rank", rank), ("size", size), ("group", None)):
        object.__setattr__(tp, name, value)
    return tp


def test_tp_must_divide_the_query_heads(tmp_path: Path) -> None:
    config = load_model_config(str(write_llama_checkpoint(tmp_path, seed=11)))
    with pytest.raises(ValueError, match="tp 3 does not divide 4 query heads"):
        part_of(config, 0, 3)


def test_dummy_weights_follow_the_seed(tmp_path: Path) -> None:
    path = write_llama_checkpoint(tmp_path, seed=12)
    one, same, other = (build(path, "dummy", seed).state_dict() for seed in (1, 1, 2))
    assert all(torch.equal(one[name], same[name]) for name in one)
    assert not any(torch.equal(one[name], other[name]) for name in one)
    assert one["model.norm.weight"].mean() == pytest.approx(1.0, abs=0.1)
    assert one["lm_head.weight"].std() == pytest.approx(0.02, rel=0.1)


def test_the_head_of_one_rank_gives_all_logits() -> None:
    head = ParallelLMHead(7, 4, TensorParallel(0, 1), Placement(torch.float32, torch.device("cpu")))
    torch.nn.init.ones_(head.weight)
    logits = head(torch.ones(2, 4))
    assert logits is not None
    assert logits.tolist() == [[4.0] * 7] * 2
