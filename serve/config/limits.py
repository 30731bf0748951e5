"""What replicas may take on at a time, from the options."""

from __future__ import annotations

import argparse
from dataclasses import dataclass, fields
from typing import Any

from serve.config import options
from serve.config.options import option_name
from serve.model_config.config import ModelConfig


@dataclass(frozen=True, slots=True)
class PhaseLimits:
    """What one replica may take on at a time."""

    max_num_seqs: int
    max_num_batched_tokens: int
    gpu_memory_utilization: float


PHASE_LIMITS = tuple(field.name for field in fields(PhaseLimits))


def phase_limits(
    given: argparse.Namespace, colocated: bool, model: ModelConfig
) -> tuple[PhaseLimits, PhaseLimits]:
    """Those of prefill and of decode replicas. ``ValueError`` if they contradict each other."""
    context = given.max_model_len or model.max_position_embeddings
    whole_prompt = 0 if given.enable_chunked_prefill else context
    if colocated:
        both = _limits(given, "", max(options.MIXED_BATCHED_TOKENS, whole_prompt))
        return both, both
    tokens = max(options.PREFILL_BATCHED_TOKENS, whole_prompt)
    return (
        _limits(given, "prefill_", tokens),
        _limits(given, "decode_", options.DECODE_BATCHED_TOKENS),
    )


def _limits(given: argparse.Namespace, prefix: str, default_tokens: int) -> PhaseLimits:
    def value(name: str) -> Any:
        own = getattr(given, prefix + name)
        return getattr(given, name) if own is None else own

    tokens = value("max_num_batched_tokens") or default_tokens
    seqs = value("max_num_seqs") or min(options.MAX_NUM_SEQS, tokens)
    # Every running sequence takes a token of each step; a prefill replica runs fewer at a time.
    if seqs > tokens and prefix != "prefill_":
        raise ValueError(
            f"{option_name(prefix + 'max_num_seqs')} {seqs} exceeds "
            f"{option_name(prefix + 'max_num_batched_tokens')} {tokens}"
        )
    utilization = value("gpu_memory_utilization") or options.GPU_MEMORY_UTILIZATION
    return PhaseLimits(seqs, tokens, utilization)


def checked_max_model_len(
    given: argparse.Namespace, prefill: PhaseLimits, model: ModelConfig, notes: list[str]
) -> int | None:
    """The longest context that was asked for, None if none was. ``ValueError`` if it cannot be.

    ``notes`` gets what was chosen for the user.
    """
    length: int | None = given.max_model_len
    if given.num_blocks and given.block_size and length:
        held = given.num_blocks * given.block_size
        if length > held:
            raise ValueError(f"--max-model-len {length} exceeds the {held} tokens of --num-blocks")
    budget = prefill.max_num_batched_tokens
    if given.enable_chunked_prefill or (length or model.max_position_embeddings) <= budget:
        return length
    if length is not None:
        raise ValueError(
            f"--max-model-len {length} exceeds max-num-batched-tokens {budget}, and without "
            "chunked prefill a prompt must fit into one step"
        )
    notes.append(f"prompts are not chunked: max_model_len is max_num_batched_tokens, {budget}")
    return budget
