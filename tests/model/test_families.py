"""Every family's greedy tokens equal those of transformers, in one process and over ranks."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file

from serve.model_config.families import FAMILIES
from serve.model_config.file import load_model_config
from tests.e2e.test_matrix import greedy, run_case
from tests.model.test_parity import check_parity, load, prompts, run_greedy
from tests.support.checkpoints import load_reference, reference_greedy, write_llama_checkpoint
from tests.support.families import VARIANTS, write_internlm2, write_variant
from tests.support.world import World

SERVED = (
    "mistral, window",
    "smollm3",
    "qwen2, windows",
    "qwen3, biases",
    "phi3, window",
    "phi4, part of a head",
    "gemma2",
    "gemma3",
    "gpt2",
    "opt, 350m",
    "internlm2",
)


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    world = World(3)
    yield world
    world.close()


@pytest.mark.parametrize("variant", VARIANTS)
def test_tokens_are_transformers(variant: str, tmp_path: Path) -> None:
    """Prompts shorter and longer than a window, in chunks, with outputs that outgrow it."""
    path = write_variant(tmp_path, variant, seed=1)
    check_parity(path, [6, 37, 22, 5], num_tokens=24, seed=2)


@pytest.mark.parametrize("rope", ["default", "dynamic", "linear"])
@pytest.mark.parametrize("heads", [(4, 4), (4, 2), (6, 1)])
def test_internlm2_is_llama_under_other_names(
    rope: str, heads: tuple[int, int], tmp_path: Path
) -> None:
    """The reference is transformers' Llama with the same weights."""
    num_heads, num_kv_heads = heads
    llama = write_llama_checkpoint(
        tmp_path / "llama", seed=3, rope=rope, num_heads=num_heads, num_kv_heads=num_kv_heads
    )
    path = write_internlm2(tmp_path / "internlm2", llama)
    config, model = load(path)
    rng = random.Random(4)
    texts = prompts(rng, [6, 37, 22], config.vocab_size)
    reference = load_reference(llama)
    expected = [reference_greedy(reference, text, 16) for text in texts]
    assert run_greedy(config, model, [(text, 16) for text in texts], rng) == expected


@pytest.mark.parametrize("split", ["1P+1D", "colocated tp 2", "tp 1 to 2"])
@pytest.mark.parametrize("variant", SERVED)
def test_through_prefill_and_decode_ranks(
    world: World, variant: str, split: str, tmp_path: Path
) -> None:
    """Chunks are smaller than prompts, so history, windows and transfers all affect the result."""
    if variant == "internlm2":
        source = write_llama_checkpoint(tmp_path / "llama", seed=5)
        path = write_internlm2(tmp_path / "internlm2", source)
    else:
        source = path = write_variant(tmp_path, variant, seed=1)
    rng = random.Random(6)
    jobs = [greedy([rng.randrange(128) for _ in range(rng.randint(3, 40))], 12) for _ in range(6)]
    options = ["--max-num-batched-tokens", "13", "--max-num-seqs", "4", "--block-size", "4"]
    result = run_case(world, path, split, jobs, *options)
    reference = load_reference(source)
    for job, answer in zip(jobs, result.answers, strict=True):
        assert answer.token_ids == list(reference_greedy(reference, job.prompt_ids, 12))


@pytest.mark.parametrize(
    ("variant", "prefix", "with_head"),
    [
        ("gpt2", "transformer.", False),
        ("gpt2", "transformer.", True),
        ("opt, 350m", "model.", False),
        ("opt, 350m", "model.", True),
        ("opt", "model.decoder.", False),
        ("qwen2", "model.", False),
        ("qwen2", "model.", True),
        ("qwen3", "model.", True),
        ("phi3", "model.", True),
        ("gemma3", "model.", False),
        ("internlm2", "model.", True),
    ],
)
def test_checkpoints_of_the_bare_model(
    variant: str, prefix: str, with_head: bool, tmp_path: Path
) -> None:
    """Tensor names may lack the prefix of the language model.

    GPT-2, some OPT and embedding models are published like this, in .bin files, with masks among
    the weights. A tied head may be stored as well.
    """
    if variant == "internlm2":
        llama = write_llama_checkpoint(tmp_path / "llama", seed=5)
        source, reference = write_internlm2(tmp_path / "full", llama), load_reference(llama)
    else:
        source = write_variant(tmp_path / "full", variant, seed=1)
        reference = load_reference(source)
    full = load_file(source / "model.safetensors")
    state = {name.removeprefix(prefix): tensor for name, tensor in full.items()}
    assert not any(name.startswith(prefix) for name in state)
    if variant == "gpt2":
        state |= {"h.0.attn.bias": torch.ones(1, 1, 4, 4), "h.0.attn.masked_bias": torch.ones(())}
    if with_head and variant != "internlm2":
        state["lm_head.weight"] = reference.state_dict()["lm_head.weight"]
    path = tmp_path / "bare"
    path.mkdir()
    torch.save(state, path / "pytorch_model.bin")
    shutil.copy(source / "config.json", path / "config.json")
    config, model = load(path)
    rng = random.Random(7)
    texts = prompts(rng, [6, 20], config.vocab_size)
    expected = [reference_greedy(reference, text, 12) for text in texts]
    assert run_greedy(config, model, [(text, 12) for text in texts], rng) == expected


def test_every_architecture_is_tried() -> None:
    kinds = [getattr(transformers, kind) for kind, _ in VARIANTS.values()]
    tried = {transformers.AutoModelForCausalLM._model_mapping[kind].__name__ for kind in kinds}
    # Llama is tested in test_parity; transformers has no class for InternLM2.
    assert FAMILIES.keys() == tried | {"LlamaForCausalLM", "InternLM2ForCausalLM"}


@pytest.mark.parametrize("variant", ["qwen2", "gemma2", "gemma3", "gpt2", "opt"])
def test_bidirectional_attention_is_refused(variant: str, tmp_path: Path) -> None:
    """Embedding models attend to later tokens, which transformers supports in every family."""
    file = write_variant(tmp_path, variant, seed=1) / "config.json"
    config = json.loads(file.read_text())
    file.write_text(json.dumps(config | {"is_causal": True, "use_bidirectional_attention": None}))
    load_model_config(str(tmp_path))
    file.write_text(json.dumps(config | {"is_causal": False}))
    with pytest.raises(ValueError, match="is_causal False is not supported"):
        load_model_config(str(tmp_path))
    if variant.startswith("gemma"):
        file.write_text(json.dumps(config | {"use_bidirectional_attention": True}))
        with pytest.raises(ValueError, match="use_bidirectional_attention True"):
            load_model_config(str(tmp_path))


def test_longrope_depends_on_the_served_context(tmp_path: Path) -> None:
    config = load_model_config(str(write_variant(tmp_path, "phi3, longrope beyond", seed=1)))
    assert config.rope is not None
    assert config.rope.is_long
    short = config.for_context(4).rope
    assert short is not None
    assert not short.is_long
