"""Sweep folder: the measurements of an experiment as files, which are the sweep's whole state.

experiment.json                        the experiment that the folder belongs to
points/CONFIGURATION/rate-R.json       run files, one a rate; a file exists only when complete
servers/CONFIGURATION.log              stdout and stderr of the servers
summary.json, summary.md, plots/       made from the points
"""

from __future__ import annotations

import fcntl
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from bench.sweep.experiment import Experiment, ExperimentError
from bench.sweep.summary import Run, rate_of

# Keys that may differ when a sweep is started again, because they change no measured point.
_MAY_CHANGE = ("description", "goals", "rates")


class BadRunFile(Exception):
    """A run file that is not JSON."""


@dataclass(frozen=True, slots=True)
class SweepFolder:
    """The files of a sweep, all under ``top``."""

    top: Path

    @property
    def servers(self) -> Path:
        """The folder of the servers' logs."""
        return self.top / "servers"

    @property
    def plots(self) -> Path:
        return self.top / "plots"

    def point(self, configuration: str, rate: float) -> Path:
        """Return the path of the run file of a configuration at a rate [req/s]."""
        return self._points(configuration) / f"rate-{repr(rate).removesuffix('.0')}.json"

    def runs(self, configuration: str) -> tuple[Run, ...]:
        """Read the runs by rising rate. Raises ``BadRunFile`` if a file is not JSON."""
        paths = self._points(configuration).glob("rate-*.json")
        return tuple(sorted((read_run(path) for path in paths), key=rate_of))

    def write(self, name: str, content: bytes) -> Path:
        """Write a file completely; an interruption leaves the file as it was before."""
        path = self.top / name
        temporary = path.with_name(f"{name}.tmp")
        temporary.write_bytes(content)
        return temporary.replace(path)

    @contextmanager
    def claimed(self, experiment: Experiment) -> Iterator[None]:
        """Lock the folder for this experiment; make it if it does not exist.

        Raises ``ExperimentError`` if another sweep holds it, or if it belongs to an experiment
        whose points would not be comparable.
        """
        self.top.mkdir(parents=True, exist_ok=True)
        with (self.top / "experiment.json").open("a+b") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise ExperimentError(f"another sweep is writing to {self.top}") from error
            file.seek(0)
            before, now = file.read(), indented(experiment.resolved())
            if before:
                self._refuse_other(msgspec.json.decode(before), msgspec.json.decode(now))
            file.truncate(0)
            file.write(now)
            file.flush()
            yield

    def _points(self, configuration: str) -> Path:
        return self.top / "points" / configuration

    def _refuse_other(self, before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
        changed = [
            key
            for key in sorted(before.keys() | now.keys())
            if key not in _MAY_CHANGE and before.get(key) != now.get(key)
        ]
        if changed:
            raise ExperimentError(
                f"{self.top} belongs to another experiment: another {', '.join(changed)}"
            )


def read_run(path: Path) -> Run:
    """Read a run file. Raises ``BadRunFile`` if it is not JSON."""
    try:
        found: Run = msgspec.json.decode(path.read_bytes())
    except msgspec.DecodeError as error:
        raise BadRunFile(f"{path} is no run file: {error}") from error
    return found


def indented(content: Any) -> bytes:
    """Encode as indented JSON."""
    return msgspec.json.format(msgspec.json.encode(content), indent=2) + b"\n"
