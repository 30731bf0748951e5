"""argv and environment into frozen dataclasses, before torch is imported."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from serve.config.limits import PHASE_LIMITS, PhaseLimits, checked_max_model_len, phase_limits
from serve.config.model_source import (
    DEFAULT_NAME,
    LoadFormat,
    ModelSource,
    default_model,
    find_model,
    find_tokenizer,
    read_chat_template,
    resolve_load_format,
)
from serve.config.options import KV_PUSH_BYTES, KVTransport, option_name
from serve.config.options import build_parser as build_parser
from serve.config.sampling_defaults import SamplingDefaults, read_sampling_defaults
from serve.model_config.config import ModelConfig
from serve.model_config.file import load_model_config
from serve.topology import ReplicaSpec


class ConfigError(Exception):
    """The command asks for something that cannot be; the text is one line for its user."""


@dataclass(frozen=True, slots=True)
class ServerConfig:
    """Everything that argv decides. Paths are resolved; values are valid together."""

    model: str  # a directory or a .gguf file on this machine
    model_config: ModelConfig
    tokenizer: str | None  # None: prompts are token ids only
    served_model_names: tuple[str, ...]
    host: str
    port: int
    api_key: str | None
    dtype: str  # auto, or one of serve.model_config.fields.DTYPES
    load_format: LoadFormat  # auto is resolved
    replica_specs: tuple[ReplicaSpec, ...]
    partition_id: int  # replicas [0, partition_id) prefill; equal to 0: colocated, all are mixed
    prefill: PhaseLimits
    decode: PhaseLimits  # colocated: the same as prefill
    enable_chunked_prefill: bool
    enforce_eager: bool  # no CUDA graphs
    block_size: int | None  # None: what the attention prefers
    num_blocks: int | None  # None: what memory allows
    max_model_len: int | None  # None: what the model and the pools allow
    max_waiting: int
    kv_push_bytes: int
    kv_transport: KVTransport
    drain_timeout_s: float
    seed: int
    chat_template: str | None  # the template's text
    sampling_defaults: SamplingDefaults
    dispatch_policy: str
    schedule_policy: str
    log_level: str
    notes: tuple[str, ...] = ()  # what was chosen for the user, to be logged

    @property
    def colocated(self) -> bool:
        """Whether every replica runs both phases."""
        return self.partition_id == 0


def parse_args(argv: Sequence[str], world_size: int) -> ServerConfig:
    """The configuration of a job of ``world_size`` ranks, from ``argv`` without the program's name.

    Raises ``ConfigError`` with one clear line for anything wrong. ``--help`` prints the manual page
    and raises ``SystemExit(0)``. A model given by hub id is downloaded.
    """
    try:
        return _configure(build_parser().parse_args(argv), world_size)
    except ValueError as error:
        raise ConfigError(" ".join(str(error).split())) from error


def _configure(given: argparse.Namespace, world_size: int) -> ServerConfig:
    notes: list[str] = []
    # What needs no file is checked first: a download should not precede a wrong number.
    specs = _replica_specs(given, world_size)
    partition_id = _partition_id(given, specs, notes)
    _refuse_ignored(given, colocated=partition_id == 0)
    source = _find_source(given, notes)
    model_config = load_model_config(source.path)
    _check_model(given, specs, model_config)
    prefill, decode = phase_limits(given, partition_id == 0, model_config)
    max_model_len = checked_max_model_len(given, prefill, model_config, notes)
    model_config = model_config.for_context(max_model_len or model_config.max_position_embeddings)
    if (rope := model_config.rope) is not None and rope.is_long:
        short = rope.original_max_position_embeddings
        notes.append(
            f"LongRoPE: all prompts have the rotation for contexts over {short} tokens, short ones "
            f"too; --max-model-len {short} serves them as the model was trained"
        )
    defaults = SamplingDefaults()
    if given.generation_config == "auto":
        defaults = read_sampling_defaults(Path(source.path))
    if defaults != SamplingDefaults():
        notes.append(f"requests that leave it open: {defaults} (generation_config.json)")
    return ServerConfig(
        model=source.path,
        model_config=model_config,
        tokenizer=find_tokenizer(given.tokenizer, source),
        served_model_names=_served_names(given, source),
        load_format=resolve_load_format(source, given.load_format),
        replica_specs=specs,
        partition_id=partition_id,
        prefill=prefill,
        decode=decode,
        max_model_len=max_model_len,
        kv_push_bytes=given.kv_push_bytes or KV_PUSH_BYTES,
        kv_transport=given.kv_transport or "p2p",
        chat_template=read_chat_template(given.chat_template),
        sampling_defaults=defaults,
        notes=tuple(notes),
        **{name: getattr(given, name) for name in _TAKEN_AS_GIVEN},
    )


_TAKEN_AS_GIVEN = (
    "host", "port", "api_key", "dtype", "enable_chunked_prefill", "enforce_eager",
    "block_size", "num_blocks", "max_waiting", "drain_timeout_s", "seed", "dispatch_policy",
    "schedule_policy", "log_level",
)  # fmt: skip


# --- replicas -----------------------------------------------------------------------------------


def _replica_specs(given: argparse.Namespace, world_size: int) -> tuple[ReplicaSpec, ...]:
    if not given.replica_spec:
        return (ReplicaSpec(1),) * world_size
    for tp, pp in given.replica_spec:
        if pp != 1:
            raise ValueError(
                f"--replica-spec {tp},{pp}: pipeline parallelism (pp {pp}) is not built"
            )
    needed = sum(tp * pp for tp, pp in given.replica_spec)
    if needed != world_size:
        raise ValueError(
            f"--replica-spec needs {needed} ranks in all, torchrun started {world_size} "
            f"(--nproc-per-node)"
        )
    return tuple(ReplicaSpec(tp, pp) for tp, pp in given.replica_spec)


def _partition_id(
    given: argparse.Namespace, specs: tuple[ReplicaSpec, ...], notes: list[str]
) -> int:
    num_replicas = len(specs)
    if given.mode == "colocated":
        if given.partition_id is not None:
            raise ValueError("--partition-id has no meaning with --mode colocated")
        return 0
    if num_replicas == 1:
        if given.mode or given.partition_id is not None:
            name = "--mode disaggregated" if given.mode else "--partition-id"
            raise ValueError(f"{name} needs at least two replicas, and there is one")
        notes.append("one replica: colocated, it prefills and decodes")
        return 0
    if given.partition_id is None:
        partition_id = max(1, num_replicas // 2)
        notes.append(
            f"{num_replicas} replicas: {partition_id} prefill, {num_replicas - partition_id} decode"
        )
        return partition_id
    if not 1 <= given.partition_id < num_replicas:
        raise ValueError(
            f"--partition-id {given.partition_id} is not between 1 and {num_replicas - 1}, so that "
            f"of {num_replicas} replicas at least one prefills and one decodes"
        )
    return int(given.partition_id)


def _refuse_ignored(given: argparse.Namespace, *, colocated: bool) -> None:
    if colocated:
        names = [f"{phase}_{name}" for phase in ("prefill", "decode") for name in PHASE_LIMITS]
        for name in [*names, "kv_push_bytes", "kv_transport"]:
            if getattr(given, name) is not None:
                raise ValueError(f"{option_name(name)} has no meaning when replicas are colocated")
    if given.num_blocks is not None:
        for name in ("", "prefill_", "decode_"):
            if getattr(given, f"{name}gpu_memory_utilization") is not None:
                option = option_name(f"{name}gpu_memory_utilization")
                raise ValueError(f"{option} has no meaning together with --num-blocks")
    if given.tokenizer == "none" and given.chat_template is not None:
        raise ValueError("--chat-template has no meaning with --tokenizer none")


# --- model --------------------------------------------------------------------------------------


def _find_source(given: argparse.Namespace, notes: list[str]) -> ModelSource:
    if given.model is not None:
        return find_model(given.model, given.load_format)
    source = default_model()
    notes.append(f"no --model given: serving {DEFAULT_NAME} from {source.path}")
    return source


def _check_model(
    given: argparse.Namespace, specs: tuple[ReplicaSpec, ...], model: ModelConfig
) -> None:
    for spec in specs:
        if model.num_heads % spec.tp:
            raise ValueError(
                f"--replica-spec {spec.tp},{spec.pp}: tp {spec.tp} does not divide the model's "
                f"{model.num_heads} query heads"
            )
    longest = model.max_position_embeddings
    if given.max_model_len is not None and given.max_model_len > longest:
        raise ValueError(f"--max-model-len {given.max_model_len} exceeds the model's {longest}")


def _served_names(given: argparse.Namespace, source: ModelSource) -> tuple[str, ...]:
    names = tuple(given.served_model_name or (source.name,))
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"--served-model-name: {name} is given twice")
    return names
