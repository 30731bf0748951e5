"""Run: ``python -m bench.sweep`` measures an experiment's servers over rates up to their knees."""

from __future__ import annotations

import argparse
import shlex
import signal
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from bench.load.plots import Series, draw_sweep
from bench.load.workload import make_plan
from bench.sweep.child import Child
from bench.sweep.configuration import ROOT, Configuration, configurations, load_command
from bench.sweep.experiment import Experiment, ExperimentError, read_experiment
from bench.sweep.folder import BadRunFile, SweepFolder, indented, read_run
from bench.sweep.knee import next_rate
from bench.sweep.server_job import START_TIMEOUT_S, ServerFailed, ServerJob, commands
from bench.sweep.summary import Measured, render_sweep, summarise_sweep
from serve.config.model_source import default_model

INTERRUPTED = 130
_LOAD_STOP_S = 10.0
_DRY_RUN_PORT = 8000


class LoadFailed(Exception):
    """The load could not be sent; its own output says why."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit status."""
    parser = make_parser()
    args = parser.parse_args(argv)
    if args.output is None and not args.dry_run:
        parser.error("--output FOLDER is required without --dry-run")
    try:
        experiment = read_experiment(args.experiment, args.gpus, args.model, args.trace)
        every = configurations(experiment)
        selected = _select(every, args.only)
        _check(experiment, selected)
    except (ValueError, OSError) as error:
        parser.error(str(error))
    if args.dry_run:
        _print_commands(experiment, selected, args.output or Path("FOLDER"), args.base_port)
        return 0
    folder = SweepFolder(args.output)
    sweep = Sweep(experiment, every, folder, args.base_port, args.start_timeout_s)
    try:
        with _signals(), folder.claimed(experiment):
            return sweep.run(selected)
    except ExperimentError as error:
        parser.error(str(error))
    except KeyboardInterrupt:
        print("interrupted; start the same command again to continue", file=sys.stderr)
        return INTERRUPTED


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m bench.sweep",
        description="Measure server configurations over request rates. Start the same command "
        "again to continue an interrupted sweep.",
        epilog="Exit status: 0 when everything is measured, 1 if a configuration failed, 2 for an "
        "invalid experiment, 130 when interrupted.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("experiment", type=Path, metavar="EXPERIMENT.yaml")
    add("--output", type=_absolute, metavar="FOLDER",
        help="folder for run files, logs, plots, summary. Required without --dry-run.")  # fmt: skip
    add("--gpus", type=int, metavar="N",
        help="number of GPUs, or of ranks on the CPU. Default: the experiment's.")  # fmt: skip
    add("--model", type=Path, metavar="PATH", help="model. Default: the experiment's.")
    add("--trace", type=Path, metavar="FILE", help="trace file. Default: the experiment's.")
    add("--only", nargs="+", metavar="NAME",
        help="measure only these configurations. Default: all.")  # fmt: skip
    add("--base-port", type=int, metavar="PORT",
        help="port of the server; copies take the next ones. Default: any free port.")  # fmt: skip
    add("--start-timeout-s", type=float, default=START_TIMEOUT_S, metavar="S",
        help="time that a server may take until it is healthy. Default: %(default)g.")  # fmt: skip
    add("--dry-run", action="store_true",
        help="check experiment, model and trace; print the commands; run nothing")  # fmt: skip
    return parser


@dataclass(frozen=True, slots=True)
class Sweep:
    """One experiment and its folder. A rate whose run file exists is not measured again."""

    experiment: Experiment
    every: Sequence[Configuration]
    folder: SweepFolder
    base_port: int | None = None
    start_timeout_s: float = START_TIMEOUT_S

    def run(self, selected: Sequence[Configuration]) -> int:
        """Measure the missing rates of ``selected`` and return the exit status.

        The summary is written whenever a configuration is done, and when interrupted.
        """
        failures: dict[str, str] = {}
        summary_is_stale = False
        try:
            for configuration in selected:
                if summary_is_stale:
                    self.write_summary(failures)
                try:
                    summary_is_stale = self._measure(configuration)
                except (ServerFailed, LoadFailed, BadRunFile) as error:
                    failures[configuration.name] = str(error)
                    print(f"failed: {error}", file=sys.stderr, flush=True)
                    summary_is_stale = True
        finally:
            self.write_summary(failures)
        return 1 if failures else 0

    def write_summary(self, failures: Mapping[str, str]) -> None:
        """Write ``summary.json``, ``summary.md`` and ``plots/`` from all run files."""
        measured = [self._measured(one, failures.get(one.name)) for one in self.every]
        summary = summarise_sweep(self.experiment, measured)
        self.folder.write("summary.json", indented(summary))
        written = self.folder.write("summary.md", render_sweep(summary).encode())
        experiment = self.experiment
        series = [Series(one.name, one.runs, one.num_gpus) for one in measured if one.runs]
        references = {
            one.name: [(rate / experiment.gpus, share) for rate, share in one.points]
            for one in experiment.references
        }
        if series:
            draw_sweep(experiment.name, series, experiment.goals, self.folder.plots, references)
        print(f"summary: {written}", flush=True)

    def _measure(self, configuration: Configuration) -> bool:
        """Measure the missing rates of a configuration; return whether there were any."""
        rate = self._next_rate(configuration)
        if rate is None:
            print(f"{configuration.name}: complete", flush=True)
            return False
        logs = self.folder.servers
        with ServerJob(configuration, logs, self.base_port, self.start_timeout_s) as job:
            while rate is not None:
                self._measure_rate(configuration, job, rate)
                job.wait_idle()
                rate = self._next_rate(configuration)
        return True

    def _measure_rate(self, configuration: Configuration, job: ServerJob, rate: float) -> None:
        print(f"{configuration.name}: {rate:g} requests/s", flush=True)
        path = self.folder.point(configuration.name, rate)
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f"{path.name}.tmp")
        temporary.unlink(missing_ok=True)
        load = Child(
            load_command(self.experiment, configuration, job.base_urls, rate, temporary), ROOT
        )
        try:
            status = job.wait_for(load)
        except BaseException:
            load.signal(signal.SIGINT)
            raise
        finally:
            load.end(_LOAD_STOP_S)
        job.check()
        if not temporary.exists():
            raise LoadFailed(f"the load at {rate:g} requests/s ended with status {status}")
        if read_run(temporary).get("interrupted"):
            raise LoadFailed(f"the load at {rate:g} requests/s was interrupted")
        temporary.replace(path)

    def _measured(self, configuration: Configuration, failure: str | None = None) -> Measured:
        runs = self.folder.runs(configuration.name)
        found = Measured(configuration.name, configuration.num_gpus, runs, failure=failure)
        return found if self._after(found) is not None else found.completed()

    def _next_rate(self, configuration: Configuration) -> float | None:
        return self._after(self._measured(configuration))

    def _after(self, measured: Measured) -> float | None:
        rates = self.experiment.rates
        return next_rate(
            measured.attainments,
            rates.values,
            self.experiment.goals[0],
            rates.bisect,
            rates.stop_below,
            rates.extend,
        )


def _select(every: Sequence[Configuration], only: Sequence[str] | None) -> list[Configuration]:
    names = [one.name for one in every]
    for name in only or ():
        if name not in names:
            raise ExperimentError(f"--only {name}: the configurations are {', '.join(names)}")
    return [one for one in every if only is None or one.name in only]


def _check(experiment: Experiment, selected: Sequence[Configuration]) -> None:
    """Raise ``ValueError`` or ``OSError`` if the model, a trace or a load is invalid."""
    if experiment.model is None:
        if any(launch.folder == ROOT for one in selected for launch in one.launches):
            default_model()
    elif not any(path.is_file() for path in _model_files(Path(experiment.model))):
        raise ExperimentError(f"{experiment.model} has no config.json and is no .gguf file")
    for configuration in selected:
        load = experiment.workload.merged(configuration.load_options)
        make_plan(load.plan_options(experiment.rates.values[0]))


def _model_files(model: Path) -> tuple[Path, ...]:
    return (model / "config.json", model) if model.suffix == ".gguf" else (model / "config.json",)


def _print_commands(
    experiment: Experiment, selected: Sequence[Configuration], folder: Path, base_port: int | None
) -> None:
    first_port = _DRY_RUN_PORT if base_port is None else base_port
    for configuration in selected:
        print(f"# {configuration.name}: {configuration.num_gpus} GPUs")
        ports = range(first_port, first_port + len(configuration.launches))
        for line in commands(configuration, ports):
            print(line)
        urls = configuration.base_urls or [f"http://127.0.0.1:{port}" for port in ports]
        for rate in sorted(experiment.rates.values):
            output = SweepFolder(folder).point(configuration.name, rate)
            print(shlex.join(load_command(experiment, configuration, urls, rate, output)))


@contextmanager
def _signals() -> Iterator[None]:
    """Treat SIGTERM and SIGHUP as Ctrl-C, also if the shell had Ctrl-C ignored."""
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = {number: signal.signal(number, _interrupt) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _interrupt(number: int, frame: object) -> NoReturn:
    raise KeyboardInterrupt


def _absolute(text: str) -> Path:
    return Path(text).absolute()
