"""The limits of prefill and decode replicas, from the options."""

from __future__ import annotations

import argparse
from dataclasses import dataclass, fields
from typing import Any

from serve.config import options
from serve.config.options import option_name
from serve.model_config.config import ModelConfig


@dataclass(frozen=True, slots=True)
class PhaseLimits:
    """The limits of the replicas that run one phase."""

    max_num_seqs: int
    max_num_batched_tokens: int
    gpu_memory_utilization: float


PHASE_LIMITS = tuple(field.name for field in fields(PhaseLimits))


def phase_limits(
    args: argparse.Namespace, colocated: bool, model: ModelConfig
) -> tuple[PhaseLimits, PhaseLimits]:
    """Return the limits of prefill and of decode replicas; colocated, both are the same.

    Raises ``ValueError`` if options contradict each other.
    """
    context = args.max_model_len or model.max_position_embeddings
    whole_prompt = 0 if args.enable_chunked_prefill else context
    if colocated:
        both = _limits(args, "", max(options.MIXED_BATCHED_TOKENS, whole_prompt))
        return both, both
    tokens = max(options.PREFILL_BATCHED_TOKENS, whole_prompt)
    return (
        _limits(args, "prefill_", tokens),
        _limits(args, "decode_", options.DECODE_BATCHED_TOKENS),
    )


def _limits(args: argparse.Namespace, prefix: str, default_tokens: int) -> PhaseLimits:
    def value(name: str) -> Any:
        specific = getattr(args, prefix + name)
        return getattr(args, name) if specific is None else specific

    tokens = value("max_num_batched_tokens") or default_tokens
    seqs = value("max_num_seqs") or min(options.MAX_NUM_SEQS, tokens)
    # Decode needs a token of the step for every sequence. Prefill runs fewer sequences in a step.
    if seqs > tokens and prefix != "prefill_":
        raise ValueError(
            f"{option_name(prefix + 'max_num_seqs')} {seqs} exceeds "
            f"{option_name(prefix + 'max_num_batched_tokens')} {tokens}"
        )
    utilization = value("gpu_memory_utilization") or options.GPU_MEMORY_UTILIZATION
    return PhaseLimits(seqs, tokens, utilization)


def checked_max_model_len(
    args: argparse.Namespace, prefill: PhaseLimits, model: ModelConfig, notes: list[str]
) -> int | None:
    """Return the longest context to serve, or None for as much as the model and the pools allow.

    Appends choices made for the user to ``notes``. Raises ``ValueError`` if --max-model-len does
    not fit.
    """
    length: int | None = args.max_model_len
    if args.num_blocks and args.block_size and length:
        capacity = args.num_blocks * args.block_size
        if length > capacity:
            raise ValueError(
                f"--max-model-len {length} exceeds the {capacity} tokens of --num-blocks"
            )
    budget = prefill.max_num_batched_tokens
    if args.enable_chunked_prefill or (length or model.max_position_embeddings) <= budget:
        return length
    if length is not None:
        raise ValueError(
            f"--max-model-len {length} exceeds max-num-batched-tokens {budget}, and without "
            "chunked prefill a prompt must fit into one step"
        )
    notes.append(f"prompts are not chunked: max_model_len is max_num_batched_tokens, {budget}")
    return budget
