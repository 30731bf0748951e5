"""Build the plan entry of a step, which every rank executes without further state."""

from __future__ import annotations

from serve.protocol.plan import SampleRow, Step, StepSequence, sampled_by
from serve.replica.scheduler import Batch, Chunk


def build_step(batch: Batch, eos_token_ids: tuple[int, ...]) -> Step:
    """Return the plan entry of ``batch``: token ids, positions, block tables, how to sample."""
    return Step(
        tuple(_build_sequence(chunk) for chunk in batch.chunks),
        tuple(_build_row(chunk, eos_token_ids) for chunk in batch.chunks if chunk.sample),
    )


def _build_sequence(chunk: Chunk) -> StepSequence:
    sequence, start = chunk.sequence, chunk.start
    if chunk.source is not None:
        token_ids: tuple[int, ...] = (sampled_by(chunk.source),)
    else:
        token_ids = tuple(sequence.token_ids[start : start + chunk.num_tokens])
    return StepSequence(start, token_ids, tuple(sequence.block_table), chunk.sample)


def _build_row(chunk: Chunk, eos_token_ids: tuple[int, ...]) -> SampleRow:
    sequence = chunk.sequence
    index = sequence.next_output_index - 1  # this step's token is counted as pending already
    return SampleRow(sequence.request, index, eos_token_ids, sequence.token_ids)
