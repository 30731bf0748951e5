"""The model's greedy tokens equal those of transformers, for any composition of steps."""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from serve.comm.tensor_parallel import TensorParallel
from serve.kv.cache import KVCache
from serve.model.forward_batch import build_forward_batch
from serve.model.registry import build_model
from serve.model.weights.load import load_weights
from serve.model_config.config import ModelConfig
from serve.model_config.file import load_model_config
from serve.protocol.plan import Step, StepSequence
from tests.support.checkpoints import (
    ROPES,
    load_reference,
    reference_greedy,
    smollm2_gguf,
    write_llama_checkpoint,
)
from tests.support.smollm2 import GREEDY

torch.set_num_threads(1)
BLOCK_SIZE = 4


@dataclass
class Generation:
    """One running sequence: its tokens, its progress, and the chunk sizes of its prompt."""

    prompt: tuple[int, ...]
    num_tokens: int
    block_table: tuple[int, ...]
    chunks: list[int]
    output: list[int] = field(default_factory=list)
    computed: int = 0

    @property
    def done(self) -> bool:
        return len(self.output) == self.num_tokens

    def next(self, block_size: int) -> StepSequence:
        """Return the next chunk of the prompt, or the last token."""
        tokens = (*self.prompt, *self.output)
        size = self.chunks.pop(0) if self.computed < len(self.prompt) else 1
        start, self.computed = self.computed, self.computed + size
        table = self.block_table[: -(-self.computed // block_size)]
        sample = self.computed >= len(self.prompt)
        return StepSequence(start, tokens[start : self.computed], table, sample)


def load(path: Path) -> tuple[ModelConfig, nn.Module]:
    config = load_model_config(str(path))
    model = build_model(config, TensorParallel(0, 1), torch.float32, "cpu")
    load_weights(model, str(path), "auto", seed=0)
    return config, model


def split(length: int, rng: random.Random) -> list[int]:
    """Split ``length`` into positive sizes: one size, only ones, or random."""
    cuts = sorted(rng.sample(range(1, length), rng.choice([0, min(3, length - 1), length - 1])))
    return [b - a for a, b in zip([0, *cuts], [*cuts, length], strict=True)]


def run_greedy(
    config: ModelConfig,
    model: nn.Module,
    jobs: list[tuple[tuple[int, ...], int]],
    rng: random.Random,
    block_size: int = BLOCK_SIZE,
) -> list[tuple[int, ...]]:
    """Generate for all (prompt, number of tokens) in one cache, a random subset in each step."""
    tables = [-(-(len(prompt) + count) // block_size) for prompt, count in jobs]
    free = rng.sample(range(sum(tables) + 3), sum(tables))
    layout = config.kv_layout(block_size, 4, tp=1, tp_rank=0)
    cache = KVCache(layout, sum(tables) + 3, torch.float32, "cpu")
    cache.blocks.fill_(float("nan"))  # positions that were never written must never be read
    running = []
    for (prompt, count), size in zip(jobs, tables, strict=True):
        table, free = tuple(free[:size]), free[size:]
        running.append(Generation(prompt, count, table, split(len(prompt), rng)))
    while active := [generation for generation in running if not generation.done]:
        chosen = rng.sample(active, rng.randint(1, len(active)))
        step = Step(tuple(generation.next(block_size) for generation in chosen))
        logits = model(build_forward_batch(step, block_size, "cpu"), cache)
        assert logits is not None
        assert logits.dtype == torch.float32
        sampling = [g for g, s in zip(chosen, step.sequences, strict=True) if s.sample]
        assert logits.shape == (len(sampling), config.vocab_size)
        for generation, row in zip(sampling, logits, strict=True):
            generation.output.append(int(row.argmax()))
    return [tuple(generation.output) for generation in running]


def prompts(rng: random.Random, lengths: list[int], vocab_size: int) -> list[tuple[int, ...]]:
    return [tuple(rng.randrange(vocab_size) for _ in range(length)) for length in lengths]


def check_parity(path: Path, lengths: list[int], num_tokens: int, seed: int) -> None:
    print(f"seed {seed}")
    rng = random.Random(seed)
    config, model = load(path)
    texts = prompts(rng, lengths, config.vocab_size)
    reference = load_reference(path)
    expected = [reference_greedy(reference, text, num_tokens) for text in texts]
    assert run_greedy(config, model, [(text, num_tokens) for text in texts], rng) == expected
    # The output of a model that repeats itself would prove little.
    assert len({token for output in expected for token in output}) > num_tokens // 3


@pytest.mark.parametrize("rope", ROPES)
def test_every_rope_type(rope: str, tmp_path: Path) -> None:
    """Prompts are within the pretraining context of a dynamic model, outputs far beyond it."""
    context = 48 if rope == "dynamic" else 160
    path = write_llama_checkpoint(tmp_path, seed=1, rope=rope, max_position_embeddings=context)
    check_parity(path, [1, 37, 22, 40], num_tokens=50, seed=2)


SHAPES: dict[str, dict[str, Any]] = {
    "mha": {"num_heads": 4, "num_kv_heads": 4},
    "mqa": {"num_heads": 4, "num_kv_heads": 1},
    "nine heads over three": {"num_heads": 9, "num_kv_heads": 3, "head_dim": 8},
    "tied": {"tie": True},
    "biases": {"attention_bias": True, "mlp_bias": True},
    "wide heads": {"num_heads": 4, "head_dim": 32, "hidden_size": 64},
    "sharded files": {"sharded": True},
    "torch file": {"format": "pt", "tie": True},
    "torch files": {"format": "pt", "sharded": True},
}


@pytest.mark.parametrize("shape", SHAPES)
def test_every_shape_and_format(shape: str, tmp_path: Path) -> None:
    path = write_llama_checkpoint(tmp_path, seed=3, **SHAPES[shape])
    check_parity(path, [9, 30, 2], num_tokens=16, seed=4)


def test_dynamic_rope_reads_long_prompts_as_if_token_by_token(tmp_path: Path) -> None:
    """Chunks do not change the result, unlike in transformers: it is that of one-token chunks."""
    path = write_llama_checkpoint(tmp_path, seed=5, rope="dynamic", max_position_embeddings=16)
    rng = random.Random(6)
    config, model = load(path)
    [prompt] = prompts(rng, [40], config.vocab_size)
    reference, cache = load_reference(path), None
    tokens = list(prompt)
    with torch.no_grad():
        for index in range(60):
            out = reference(torch.tensor([tokens[index : index + 1]]), past_key_values=cache)
            cache = out.past_key_values
            if index + 1 >= len(tokens):
                tokens.append(int(out.logits[0, -1].argmax()))
    expected = tuple(tokens[len(prompt) :])
    for _ in range(3):  # with different random chunks
        assert run_greedy(config, model, [(prompt, len(expected))], rng) == [expected]


def test_logits_are_close_to_transformers(tmp_path: Path) -> None:
    path = write_llama_checkpoint(tmp_path, seed=7)
    config, model = load(path)
    [prompt] = prompts(random.Random(8), [25], config.vocab_size)
    with torch.no_grad():
        expected = load_reference(path)(torch.tensor([prompt])).logits[0, -1]
    cache = KVCache(config.kv_layout(BLOCK_SIZE, 4, 1, 0), 7, torch.float32, "cpu")
    step = Step((StepSequence(0, prompt, tuple(range(7)), True),))
    logits = model(build_forward_batch(step, BLOCK_SIZE, "cpu"), cache)
    torch.testing.assert_close(logits[0], expected, rtol=1e-5, atol=1e-5)


def test_a_step_that_samples_nothing(tmp_path: Path) -> None:
    path = write_llama_checkpoint(tmp_path, seed=9)
    config, model = load(path)
    cache = KVCache(config.kv_layout(BLOCK_SIZE, 4, 1, 0), 2, torch.float32, "cpu")
    step = Step((StepSequence(0, (1, 2, 3), (1,), False),))
    logits = model(build_forward_batch(step, BLOCK_SIZE, "cpu"), cache)
    assert logits.shape == (0, config.vocab_size)


def test_smollm2_from_gguf() -> None:
    """Weights and tokens of a real model equal those that transformers dequantises."""
    path = smollm2_gguf()
    config, model = load(path)
    assert config.rope is not None
    assert (config.num_heads, config.num_kv_heads, config.rope.theta) == (9, 3, 100000.0)
    assert config.eos_token_ids == (2,)
    assert config.tie_word_embeddings
    reference = load_reference(path)
    expected_weights = reference.state_dict()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.data, expected_weights[name], rtol=0, atol=0)
    for text, tokens in GREEDY:
        assert reference_greedy(reference, text, len(tokens)) == tokens
    # "<|im_start|>user\nWhat is the capital of France?<|im_end|>\n<|im_start|>assistant\n"
    chat = (1, 4093, 198, 1780, 314, 260, 3575, 282, 4649, 47, 2, 198, 1, 520, 9531, 198)
    answers = [*GREEDY, (chat, reference_greedy(reference, chat, 12))]
    jobs = [(text, len(tokens)) for text, tokens in answers]
    expected = [tokens for _, tokens in answers]
    assert run_greedy(config, model, jobs, random.Random(10), block_size=16) == expected
