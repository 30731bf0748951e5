"""ServerConfig: the checked command line of the server. Importing it does not import torch."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from serve.config.http import HttpLimits, http_limits
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
from serve.model_config.generation_config import read_generation_config
from serve.topology import ReplicaSpec


class ConfigError(ValueError):
    """The command line cannot be served. The text is one line for the user."""


@dataclass(frozen=True, slots=True)
class ServerConfig:
    """Everything that the command line decides. Paths are resolved and values fit together."""

    model: str  # a directory or a .gguf file on this machine
    model_config: ModelConfig
    tokenizer: str | None  # None: prompts must be token ids
    served_model_names: tuple[str, ...]
    host: str
    port: int
    api_keys: tuple[str, ...]  # empty: no key is needed
    http: HttpLimits
    dtype: str  # auto, or one of serve.model_config.fields.DTYPES
    load_format: LoadFormat  # never auto
    replica_specs: tuple[ReplicaSpec, ...]
    partition_id: int  # replicas [0, partition_id) prefill; 0: colocated
    prefill: PhaseLimits
    decode: PhaseLimits  # colocated: the same as prefill
    enable_chunked_prefill: bool
    enforce_eager: bool  # no CUDA graphs
    block_size: int | None  # None: the attention chooses
    num_blocks: int | None  # None: as many as memory allows
    max_model_len: int | None  # None: as long as the model and the KV cache allow
    max_waiting: int
    max_waiting_tokens: int
    max_waiting_share: float
    kv_overcommit: float | None  # None: 1 for a server, more for a batch
    kv_push_bytes: int
    kv_transport: KVTransport
    drain_timeout_s: float
    start_timeout_s: float
    progress_timeout_s: float
    seed: int
    chat_template: str | None  # the template's text
    sampling_defaults: SamplingDefaults
    dispatch_policy: str
    schedule_policy: str
    log_level: str
    notes: tuple[str, ...] = ()  # choices made for the user, to be logged
    warnings: tuple[str, ...] = ()  # faults of the checkpoint that do not prevent serving it

    @property
    def colocated(self) -> bool:
        """Whether every replica runs both phases."""
        return self.partition_id == 0


def parse_args(argv: Sequence[str], world_size: int) -> ServerConfig:
    """Parse ``argv`` (without the program's name) for a job of ``world_size`` ranks.

    Downloads a model that is given by hub id. Raises ``ConfigError`` with one line for every
    mistake. ``--help`` prints the manual page and raises ``SystemExit(0)``.
    """
    try:
        return _configure(build_parser().parse_args(argv), world_size)
    except ValueError as error:
        raise ConfigError(" ".join(str(error).split())) from error


def _configure(args: argparse.Namespace, world_size: int) -> ServerConfig:
    notes: list[str] = []
    # First the checks that need no file, so that a wrong number is refused before a download.
    specs = _replica_specs(args, world_size)
    partition_id = _partition_id(args, specs, notes)
    _refuse_ignored(args, colocated=partition_id == 0)
    source = _find_source(args, notes)
    model_config = load_model_config(source.path)
    _check_model(args, specs, model_config)
    prefill, decode = phase_limits(args, partition_id == 0, model_config)
    max_model_len = checked_max_model_len(args, prefill, model_config, notes)
    model_config = model_config.for_context(max_model_len or model_config.max_position_embeddings)
    if (rope := model_config.rope) is not None and rope.is_long:
        short = rope.original_max_position_embeddings
        notes.append(
            f"LongRoPE: prompts of any length get the rotation for contexts over {short} tokens; "
            f"--max-model-len {short} gives short ones the rotation they were trained with"
        )
    generation_config = read_generation_config(Path(source.path))
    warnings = [*generation_config.faults]
    defaults = SamplingDefaults()
    if args.generation_config == "auto":
        defaults = read_sampling_defaults(generation_config, warnings)
    if defaults != SamplingDefaults():
        notes.append(f"default sampling parameters: {defaults} (generation_config.json)")
    return ServerConfig(
        model=source.path,
        model_config=model_config,
        tokenizer=find_tokenizer(args.tokenizer, source),
        served_model_names=_served_names(args, source),
        api_keys=tuple(args.api_key or ()),
        http=http_limits(args),
        load_format=resolve_load_format(source, args.load_format),
        replica_specs=specs,
        partition_id=partition_id,
        prefill=prefill,
        decode=decode,
        max_model_len=max_model_len,
        kv_push_bytes=args.kv_push_bytes or KV_PUSH_BYTES,
        kv_transport=args.kv_transport or "p2p",
        chat_template=read_chat_template(args.chat_template),
        sampling_defaults=defaults,
        notes=tuple(notes),
        warnings=tuple(warnings),
        **{name: getattr(args, name) for name in _UNCHANGED_OPTIONS},
    )


_UNCHANGED_OPTIONS = (
    "host", "port", "dtype", "enable_chunked_prefill", "enforce_eager",
    "block_size", "num_blocks", "max_waiting", "max_waiting_tokens", "max_waiting_share",
    "kv_overcommit", "drain_timeout_s", "start_timeout_s", "progress_timeout_s", "seed",
    "dispatch_policy", "schedule_policy", "log_level",
)  # fmt: skip


# --- replicas -----------------------------------------------------------------------------------


def _replica_specs(args: argparse.Namespace, world_size: int) -> tuple[ReplicaSpec, ...]:
    if not args.replica_spec:
        return (ReplicaSpec(1),) * world_size
    for tp, pp in args.replica_spec:
        if pp != 1:
            raise ValueError(
                f"--replica-spec {tp},{pp}: pipeline parallelism (pp {pp}) is not implemented"
            )
    needed = sum(tp * pp for tp, pp in args.replica_spec)
    if needed != world_size:
        raise ValueError(
            f"--replica-spec needs {needed} ranks in all, but torchrun started {world_size} "
            f"(--nproc-per-node)"
        )
    return tuple(ReplicaSpec(tp, pp) for tp, pp in args.replica_spec)


def _partition_id(
    args: argparse.Namespace, specs: tuple[ReplicaSpec, ...], notes: list[str]
) -> int:
    num_replicas = len(specs)
    if args.mode == "colocated":
        if args.partition_id is not None:
            raise ValueError("--partition-id has no effect with --mode colocated")
        return 0
    if num_replicas == 1:
        if args.mode or args.partition_id is not None:
            name = "--mode disaggregated" if args.mode else "--partition-id"
            raise ValueError(f"{name} needs at least two replicas, but there is one")
        notes.append("one replica: colocated, it runs prefill and decode")
        return 0
    if args.partition_id is None:
        partition_id = max(1, num_replicas // 2)
        notes.append(
            f"{num_replicas} replicas: {partition_id} prefill, {num_replicas - partition_id} decode"
        )
        return partition_id
    if not 1 <= args.partition_id < num_replicas:
        raise ValueError(
            f"--partition-id {args.partition_id} is not between 1 and {num_replicas - 1}: "
            f"of {num_replicas} replicas, at least one must prefill and one must decode"
        )
    return int(args.partition_id)


def _refuse_ignored(args: argparse.Namespace, *, colocated: bool) -> None:
    if colocated:
        names = [f"{phase}_{name}" for phase in ("prefill", "decode") for name in PHASE_LIMITS]
        for name in [*names, "kv_push_bytes", "kv_transport"]:
            if getattr(args, name) is not None:
                raise ValueError(f"{option_name(name)} has no effect when replicas are colocated")
    if args.num_blocks is not None:
        for name in ("", "prefill_", "decode_"):
            if getattr(args, f"{name}gpu_memory_utilization") is not None:
                option = option_name(f"{name}gpu_memory_utilization")
                raise ValueError(f"{option} has no effect together with --num-blocks")
    if args.tokenizer == "none" and args.chat_template is not None:
        raise ValueError("--chat-template has no effect with --tokenizer none")


# --- model --------------------------------------------------------------------------------------


def _find_source(args: argparse.Namespace, notes: list[str]) -> ModelSource:
    if args.model is not None:
        return find_model(args.model, args.load_format)
    source = default_model()
    notes.append(f"no --model given: serving {DEFAULT_NAME} from {source.path}")
    return source


def _check_model(
    args: argparse.Namespace, specs: tuple[ReplicaSpec, ...], model: ModelConfig
) -> None:
    for spec in specs:
        if model.num_heads % spec.tp:
            raise ValueError(
                f"--replica-spec {spec.tp},{spec.pp}: tp {spec.tp} does not divide the model's "
                f"{model.num_heads} query heads"
            )
    longest = model.max_position_embeddings
    if args.max_model_len is not None and args.max_model_len > longest:
        raise ValueError(f"--max-model-len {args.max_model_len} exceeds the model's {longest}")


def _served_names(args: argparse.Namespace, source: ModelSource) -> tuple[str, ...]:
    names = tuple(args.served_model_name or (source.name,))
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"--served-model-name: {name} is given twice")
    return names
