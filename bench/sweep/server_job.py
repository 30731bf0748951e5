"""Server job: starts the server under test, waits until it is healthy, and ends all of it."""

from __future__ import annotations

import os
import shlex
import signal
import socket
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from http.client import HTTPException
from pathlib import Path
from types import TracebackType
from typing import Any

import msgspec

from bench.sweep.child import Child, first_ended
from bench.sweep.configuration import PORT, Configuration, Launch

START_TIMEOUT_S = 600.0
STOP_TIMEOUT_S = 40.0  # torchrun itself kills what is left after 30
IDLE_TIMEOUT_S = 60.0
_HEALTH_INTERVAL_S = 1.0
_IDLE_INTERVAL_S = 0.2
_PROGRESS_INTERVAL_S = 15.0
_HTTP_TIMEOUT_S = 5.0
_NUM_TAIL_LINES = 20
_BUSY = ("num_waiting", "num_running", "num_receiving", "num_sending")

# A proxy of the environment must not come between the sweep and its own server.
_open = urllib.request.build_opener(urllib.request.ProxyHandler({})).open


class ServerFailed(Exception):
    """The server did not start, has died, or does not come to rest; the text says how."""


class ServerJob:
    """The processes of one configuration; ``with`` gives it healthy and ends them."""

    def __init__(
        self,
        configuration: Configuration,
        log_folder: Path,
        base_port: int | None = None,
        start_timeout_s: float = START_TIMEOUT_S,
        stop_timeout_s: float = STOP_TIMEOUT_S,
    ) -> None:
        self.base_urls = configuration.base_urls
        self._configuration = configuration
        self._log_folder = log_folder
        self._base_port = base_port
        self._start_timeout_s, self._stop_timeout_s = start_timeout_s, stop_timeout_s
        self._children: list[Child] = []
        self._logs: list[tuple[Path, int]] = []  # and where this job's part of it begins

    def __enter__(self) -> ServerJob:
        with ExitStack() as on_failure:
            on_failure.callback(self.stop)
            self._start()
            self._wait_healthy()
            on_failure.pop_all()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.stop()

    def stop(self) -> None:
        """SIGTERM, then SIGKILL for what is left after a while or at another Ctrl-C."""
        for child in self._children:
            child.signal(signal.SIGTERM)
        deadline_s = time.monotonic() + self._stop_timeout_s
        for child in self._children:
            child.end(max(0.0, deadline_s - time.monotonic()))
        self._children.clear()

    def wait_for(self, load: Child) -> int:
        """Wait until ``load`` has ended; its status. ``ServerFailed`` at once if a server dies."""
        ended = first_ended([load, *self._children], None)
        if ended is not load:
            self.check()
        return load.status()

    def check(self) -> None:
        """``ServerFailed`` if a process has ended."""
        ended = first_ended(self._children, 0)
        if ended is not None:
            raise ServerFailed(self._why(f"has ended with status {ended.status()}"))

    def wait_idle(self) -> None:
        """Wait until our server has nothing to do; others are taken to have when none waits.

        The load waits for all its answers, but replicas may still be giving memory back.
        ``ServerFailed`` if requests are left after ``IDLE_TIMEOUT_S``.
        """
        deadline_s = time.monotonic() + IDLE_TIMEOUT_S
        for url in self.base_urls:
            while busy := _busy_replicas(url):
                if time.monotonic() > deadline_s:
                    raise ServerFailed(f"{url} still has work after {IDLE_TIMEOUT_S:g} s: {busy}")
                self._pause(_IDLE_INTERVAL_S)

    def _start(self) -> None:
        launches = self._configuration.launches
        ports = _free_ports(len(launches), self._base_port)
        for index, (launch, port) in enumerate(zip(launches, ports, strict=True)):
            copy = f"-{index}" if len(launches) > 1 else ""
            log = self._log_folder / f"{self._configuration.name}{copy}.log"
            self._children.append(self._launch(launch, port, log))
        if launches:
            self.base_urls = tuple(f"http://127.0.0.1:{port}" for port in ports)

    def _launch(self, launch: Launch, port: int, path: Path) -> Child:
        command = with_port(launch, port)
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("ab") as log:
            log.write(f"$ {shlex.join(command)}\n".encode())
            log.flush()
            self._logs.append((path, log.tell()))
            print(f"starting {self._configuration.name}; log: {path}", flush=True)
            try:
                return Child(command, launch.folder, environment(launch), log)
            except OSError as error:
                raise ServerFailed(f"{self._configuration.name} cannot start: {error}") from error

    def _wait_healthy(self) -> None:
        started_s = told_s = time.monotonic()
        waiting = list(self.base_urls)
        path = self._configuration.health_path
        while waiting := [url for url in waiting if not _is_healthy(url + path)]:
            self._pause(_HEALTH_INTERVAL_S)
            now_s = time.monotonic()
            if now_s - started_s > self._start_timeout_s:
                raise ServerFailed(self._why(f"is not healthy after {self._start_timeout_s:g} s"))
            if now_s - told_s > _PROGRESS_INTERVAL_S:
                told_s = now_s
                print(f"still starting after {now_s - started_s:.0f} s", flush=True)
        print(f"healthy after {time.monotonic() - started_s:.0f} s", flush=True)

    def _pause(self, seconds: float) -> None:
        """Let time pass; a server that ends is noticed at once."""
        first_ended(self._children, seconds)
        self.check()

    def _why(self, what: str) -> str:
        parts = [f"{self._configuration.name} {what}"]
        for path, start in self._logs:
            with path.open("rb") as log:
                log.seek(start)
                lines = log.read().decode(errors="replace").splitlines()
            parts += [f"end of {path}:", *lines[-_NUM_TAIL_LINES:]]
        return "\n".join(parts)


def commands(configuration: Configuration, ports: Sequence[int]) -> list[str]:
    """What would be started, as lines for a shell."""
    lines = []
    for launch, port in zip(configuration.launches, ports, strict=True):
        changed = environment(launch).items() - os.environ.items()
        words = ["env", *(f"{name}={value}" for name, value in sorted(changed))]
        enter = f"cd {shlex.quote(str(launch.folder))} && " if launch.folder else ""
        lines.append(enter + shlex.join([*words, *with_port(launch, port)]))
    return lines


def with_port(launch: Launch, port: int) -> list[str]:
    """The command with the port that has been chosen."""
    return [word.replace(PORT, str(port)) for word in launch.command]


def environment(launch: Launch) -> dict[str, str]:
    """The environment of a process: the sweep's own, its share of the GPUs, what the file says.

    ``ServerFailed`` if fewer GPUs are visible here.
    """
    found = dict(os.environ)
    if launch.gpus is not None:
        visible = found.get("CUDA_VISIBLE_DEVICES")
        if visible is None:
            names = [str(index) for index in launch.gpus]
        else:
            names = visible.split(",")[launch.gpus.start : launch.gpus.stop]
            if visible and len(names) < len(launch.gpus):
                raise ServerFailed(f"{launch.gpus.stop} GPUs are wanted of the visible {visible}")
        found["CUDA_VISIBLE_DEVICES"] = ",".join(names)
    return found | dict(launch.env)


def _free_ports(count: int, base_port: int | None) -> list[int]:
    """Ports that nobody listens on. Who does would be taken for the server under test."""
    with ExitStack() as stack:
        # All are held until the last is known, so that none comes twice.
        probes = [stack.enter_context(socket.socket()) for _ in range(count)]
        for index, probe in enumerate(probes):
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            port = 0 if base_port is None else base_port + index
            try:
                probe.bind(("127.0.0.1", port))
            except OSError as error:
                raise ServerFailed(f"port {port} is not free: {error}") from error
        return [int(probe.getsockname()[1]) for probe in probes]


def _is_healthy(url: str) -> bool:
    try:
        with _open(url, timeout=_HTTP_TIMEOUT_S) as response:
            return bool(response.status == 200)
    except (urllib.error.URLError, HTTPException, OSError):
        return False  # not listening yet, or still loading


def _busy_replicas(url: str) -> Sequence[Any]:
    """The replicas of one of our servers that have requests; none of any other."""
    found: Any = None
    with (
        suppress(urllib.error.URLError, HTTPException, OSError, msgspec.DecodeError),
        _open(f"{url}/cluster", timeout=_HTTP_TIMEOUT_S) as response,
    ):
        found = msgspec.json.decode(response.read())
    replicas = found.get("replicas") if isinstance(found, dict) else None
    if not isinstance(replicas, list):
        return []
    return [one for one in replicas if isinstance(one, dict) and any(one.get(k) for k in _BUSY)]
