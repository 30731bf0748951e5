"""argv and environment into frozen dataclasses, before torch is imported."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Literal


class Role(StrEnum):
    """Which phases a replica runs."""

    PREFILL = "prefill"
    DECODE = "decode"
    MIXED = "mixed"


@dataclass(frozen=True, slots=True)
class ReplicaSpec:
    """One replica: ``tp * pp`` consecutive ranks with one copy of the model."""

    tp: int
    pp: int = 1


@dataclass(frozen=True, slots=True)
class PhaseLimits:
    """What one replica may take on at a time."""

    max_num_seqs: int
    max_num_batched_tokens: int
    gpu_memory_utilization: float


@dataclass(frozen=True, slots=True)
class ServerConfig:
    """Everything that argv decides. Paths are resolved; values are valid together."""

    model: str  # a directory or a .gguf file on this machine
    tokenizer: str | None  # None: prompts are token ids only
    served_model_names: tuple[str, ...]
    host: str
    port: int
    api_key: str | None
    dtype: Literal["auto", "float32", "bfloat16", "float16"]
    load_format: Literal["auto", "safetensors", "pt", "gguf", "dummy"]
    replica_specs: tuple[ReplicaSpec, ...]
    partition_id: int  # replicas [0, partition_id) prefill; equal to 0: colocated, all are mixed
    prefill: PhaseLimits
    decode: PhaseLimits
    enable_chunked_prefill: bool
    block_size: int | None  # None: what the attention prefers
    num_blocks: int | None  # None: what memory allows
    max_model_len: int | None  # None: what the model and the pools allow
    max_waiting: int
    kv_push_bytes: int
    drain_timeout_s: float
    seed: int
    chat_template: str | None  # the template's text
    dispatch_policy: str
    log_level: str
