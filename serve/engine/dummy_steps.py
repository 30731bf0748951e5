"""Dummy steps for memory profiling and warm-up: the largest that can be served, and small ones.

Their block tables repeat block 0, so a cache of one block is enough. The lengths are real.
"""

from __future__ import annotations

from collections.abc import Iterator

from serve.engine.rank_setup import RankSetup
from serve.model_config.config import ModelConfig
from serve.protocol.plan import SampleRow, Step, StepSequence
from serve.request import MAX_TOKEN_RULES, Request, SamplingParams, pack_ids

_NUM_OUTPUTS = 32  # output tokens of a row; torch uses another kernel to count up to 16


def longest_context(setup: RankSetup) -> int:
    """Return the number of tokens of the longest request."""
    return setup.config.max_model_len or setup.config.model_config.max_position_embeddings


def largest_steps(setup: RankSetup, longest: int) -> tuple[Step, Step]:
    """Build a step with the most prompt tokens and one with the most decodes.

    All their sequences end at ``longest`` tokens.
    """
    limits = setup.limits
    chunks: list[tuple[int, int]] = []
    num_left = limits.max_num_batched_tokens
    while num_left > 0 and len(chunks) < limits.max_num_seqs:
        count = min(longest, num_left)
        chunks.append((longest - count, count))
        num_left -= count
    return _step(setup, chunks), _step(setup, [(longest - 1, 1)] * limits.max_num_seqs)


def short_prompts(setup: RankSetup, count: int) -> Step:
    """Build a step of ``count`` prompts of two tokens each."""
    return _step(setup, [(0, 2)] * count)


def one_decode(setup: RankSetup) -> Step:
    """Build a step of one sequence at its second token."""
    return _step(setup, [(1, 1)])


def _step(setup: RankSetup, sequences: list[tuple[int, int]]) -> Step:
    """Build a step from ``(start, count)``: ``count`` new tokens after ``start`` earlier ones."""
    layout = setup.layout
    return Step(
        tuple(
            StepSequence(start, (0,) * count, (0,) * layout.num_blocks_for(start + count), True)
            for start, count in sequences
        ),
        tuple(_rows(len(sequences), setup.config.model_config)),
    )


def _rows(count: int, model: ModelConfig) -> Iterator[SampleRow]:
    """Yield rows that use every filter, and have as many biases and bans as a request may have.

    They have output tokens to count for penalties.
    """
    most = min(MAX_TOKEN_RULES, model.vocab_size // 2)
    sampling = SamplingParams(
        max_tokens=1,
        top_p=0.9,
        top_k=50,
        repetition_penalty=1.1,
        logit_bias=dict.fromkeys(range(most), 1.0),
        stop_token_ids=tuple(range(most, 2 * most)),
        min_tokens=_NUM_OUTPUTS + 1,
    )
    token_ids = (0,) * (1 + _NUM_OUTPUTS)
    for number in range(count):
        request = Request(id=f"warm-up {number}", prompt=pack_ids((0,)), sampling=sampling)
        yield SampleRow(request, _NUM_OUTPUTS, model.eos_token_ids, token_ids)
