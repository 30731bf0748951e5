"""Steps that no request asked for: the largest that will be served, to measure, and small ones.

Their block tables repeat block 0, so that a cache of one block is enough; the lengths are real.
"""

from __future__ import annotations

from serve.engine.rank_setup import RankSetup
from serve.protocol.messages import SampleRow, Step, StepSequence
from serve.request import Request, SamplingParams

_NUM_OUTPUTS = 32  # of a row so far: torch counts up to 16 with another kernel


def longest_context(setup: RankSetup) -> int:
    """Tokens of the longest request."""
    return setup.config.max_model_len or setup.config.model_config.max_position_embeddings


def largest_steps(setup: RankSetup, longest: int) -> tuple[Step, Step]:
    """As many prompt tokens as a step may have, and as many decodes; at the end of ``longest``."""
    limits = setup.limits
    chunks: list[tuple[int, int]] = []
    left = limits.max_num_batched_tokens
    while left > 0 and len(chunks) < limits.max_num_seqs:
        count = min(longest, left)
        chunks.append((longest - count, count))
        left -= count
    return _step(setup, chunks), _step(setup, [(longest - 1, 1)] * limits.max_num_seqs)


def short_prompts(setup: RankSetup, count: int) -> Step:
    """As many prompts, of two tokens each."""
    return _step(setup, [(0, 2)] * count)


def one_decode(setup: RankSetup) -> Step:
    """One sequence at its second token."""
    return _step(setup, [(1, 1)])


def _step(setup: RankSetup, sequences: list[tuple[int, int]]) -> Step:
    """Of sequences that bring ``count`` tokens after ``start`` others."""
    layout = setup.layout
    return Step(
        tuple(
            StepSequence(start, (0,) * count, (0,) * layout.num_blocks_for(start + count), True)
            for start, count in sequences
        ),
        tuple(_row(number) for number in range(len(sequences))),
    )


def _row(number: int) -> SampleRow:
    """One that goes through every filter, with output that is counted first."""
    sampling = SamplingParams(max_tokens=1, top_p=0.9, top_k=50, repetition_penalty=1.1)
    request = Request(id=f"rehearsal {number}", prompt_ids=(0,), sampling=sampling)
    return SampleRow(request, _NUM_OUTPUTS, token_ids=(0,) * (1 + _NUM_OUTPUTS))
