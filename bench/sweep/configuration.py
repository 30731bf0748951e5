"""Configuration: one server under test, and the commands that start it and send it load."""

from __future__ import annotations

import re
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec

from bench.sweep.experiment import Command, Experiment, ExperimentError, Running, Splits, Workload
from serve.config.options import build_parser

ROOT = Path(__file__).resolve().parent.parent.parent
PORT = "{port}"  # the placeholder in a command until a port has been chosen

# Options of our server that the sweep sets itself from the split, the model and the port.
_SET_BY_SWEEP = ("host", "port", "model", "mode", "partition-id", "replica-spec")


@dataclass(frozen=True, slots=True)
class Launch:
    """One process to start. It sees ``gpus`` of the visible GPUs; None: all of them."""

    command: tuple[str, ...]
    folder: Path | None = None  # its working directory; None: that of the sweep
    gpus: range | None = None
    env: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Configuration:
    """Processes to start, or the addresses of a server that is already running."""

    name: str
    num_gpus: int
    launches: tuple[Launch, ...] = ()
    base_urls: tuple[str, ...] = ()
    health_path: str = "/health"
    model_name: str | None = None
    load_options: Workload = field(default_factory=Workload)


def configurations(experiment: Experiment) -> tuple[Configuration, ...]:
    """Return every server under test, in the order of the file.

    Raises ``ExperimentError`` if a server is impossible or a name is used twice.
    """
    found: list[Configuration] = []
    for index, server in enumerate(experiment.servers):
        where = f"$.servers[{index}]"
        if isinstance(server, Splits):
            found += _split_configurations(experiment, server, where)
        elif isinstance(server, Command):
            found.append(_command_configuration(experiment, server, where))
        else:
            found.append(_running_configuration(experiment, server))
    names = [one.name for one in found]
    for name in names:
        if names.count(name) > 1:
            raise ExperimentError(
                f"two configurations are called {name}: give one of them a suffix"
            )
    return tuple(found)


def load_command(
    experiment: Experiment,
    configuration: Configuration,
    base_urls: Sequence[str],
    rate: float,
    output: Path,
) -> list[str]:
    """Return the command that measures one rate [req/s]. Run it in the repository's root.

    Every rate has its own seed, because a prefix cache would still hold equal prompts from the rate
    before.
    """
    load = experiment.workload.merged(configuration.load_options)
    options = {
        "model": configuration.model_name,
        "rate": rate,
        "ttft-slo": experiment.objectives.ttft_s,
        "tpot-slo": experiment.objectives.tpot_s,
        **load.set_options(),
        "seed": (load.seed or 0) + round(rate * 1000),
        "output": str(output),
    }
    return [sys.executable, "-m", "bench.serve", "--base-url", *base_urls, *to_words(options)]


def to_words(options: Mapping[str, Any]) -> list[str]:
    """Return options as words of a command line. True and False: ``--name``, ``--no-name``."""
    words = []
    for key, value in options.items():
        name = key.replace("_", "-")
        if isinstance(value, bool):
            words.append(f"--{name}" if value else f"--no-{name}")
        elif isinstance(value, list | tuple):
            words += [f"--{name}", *map(str, value)]
        elif isinstance(value, dict):
            words += [f"--{name}", msgspec.json.encode(value).decode()]
        elif value is not None:
            words += [f"--{name}", str(value)]
    return words


def _split_configurations(
    experiment: Experiment, server: Splits, where: str
) -> list[Configuration]:
    if experiment.gpus % server.tp:
        raise ExperimentError(
            f"{experiment.gpus} GPUs are not whole replicas of tp {server.tp} - at `{where}.tp`"
        )
    num_replicas = experiment.gpus // server.tp
    splits = server.splits
    if splits == "all":
        splits = ["colocated", *range(1, num_replicas)]
    found = []
    for split in splits:
        if isinstance(split, int) and split >= num_replicas:
            raise ExperimentError(
                f"{split} of {num_replicas} replicas leave none to decode - at `{where}.splits`"
            )
        base = split if isinstance(split, str) else f"{split}P+{num_replicas - split}D"
        tags = [f"tp{server.tp}"] if server.tp > 1 else []
        tags += [server.suffix] if server.suffix else []
        launch = _our_launch(experiment, server, split, where)
        found.append(Configuration("-".join([base, *tags]), experiment.gpus, (launch,)))
    return found


def _our_launch(experiment: Experiment, server: Splits, split: str | int, where: str) -> Launch:
    options = experiment.serve_options | server.options
    for name in _SET_BY_SWEEP:
        if name in options:
            raise ExperimentError(f"{name} is set by the sweep: leave it out of `{where}`")
    words = to_words({"model": experiment.model} | options)
    if server.tp > 1:
        words += ["--replica-spec", *[f"{server.tp},1"] * (experiment.gpus // server.tp)]
    if isinstance(split, int):
        words += ["--partition-id", str(split)]
    else:
        words += ["--mode", split]
    try:
        build_parser().parse_args(words)
    except ValueError as error:
        raise ExperimentError(f"{error} - in the options of `{where}`") from error
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    ranks = ["--nproc-per-node", str(experiment.gpus), "-m", "serve.launch", "--port", PORT]
    # torchrun sets OMP_NUM_THREADS to 1 itself, with a warning, but not for a single rank.
    env = {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"} | server.env
    return Launch((*torchrun, *ranks, *words), ROOT, None, env)


def _command_configuration(experiment: Experiment, server: Command, where: str) -> Configuration:
    num_gpus = server.gpus or experiment.gpus
    num_copies = num_gpus if server.copies == "per-gpu" else server.copies
    if num_gpus % num_copies:
        raise ExperimentError(
            f"{num_gpus} GPUs cannot be shared by {num_copies} copies - at `{where}.copies`"
        )
    gpus_per_copy = num_gpus // num_copies
    values = {"gpus": str(gpus_per_copy), "python": sys.executable, "port": PORT}
    if experiment.model is not None:
        values["model"] = experiment.model
    command = _filled(server.command, values, f"{where}.command")
    launches = tuple(
        Launch(command, None, range(first, first + gpus_per_copy), server.env)
        for first in range(0, num_gpus, gpus_per_copy)
    )
    return Configuration(
        name=server.name,
        num_gpus=num_gpus,
        launches=launches,
        health_path=server.health_path,
        model_name=server.model_name,
        load_options=server.load_options,
    )


def _filled(command: str, values: Mapping[str, str], where: str) -> tuple[str, ...]:
    def value(match: re.Match[str]) -> str:
        if match[1] not in values:
            hint = "the experiment has no model" if match[1] == "model" else "unknown placeholder"
            raise ExperimentError(f"{match[0]}: {hint} - at `{where}`")
        return values[match[1]]

    if PORT not in command:
        raise ExperimentError(f"the command has no {PORT} - at `{where}`")
    try:
        words = shlex.split(command)
    except ValueError as error:
        raise ExperimentError(f"{error} - at `{where}`") from error
    # Replaced after splitting, so that a path with blanks stays one word.
    return tuple(re.sub(r"\{([a-z_]+)\}", value, word) for word in words)


def _running_configuration(experiment: Experiment, server: Running) -> Configuration:
    return Configuration(
        name=server.name,
        num_gpus=server.gpus or experiment.gpus,
        base_urls=tuple(url.rstrip("/").removesuffix("/v1") for url in server.base_urls),
        health_path=server.health_path,
        model_name=server.model_name,
        load_options=server.load_options,
    )
