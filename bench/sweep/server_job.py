"""Server job: starts a server under test, waits until it is healthy, ends all its processes."""

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
STOP_TIMEOUT_S = 40.0  # torchrun itself kills its ranks after 30
IDLE_TIMEOUT_S = 60.0
_HEALTH_INTERVAL_S = 1.0
_IDLE_INTERVAL_S = 0.2
_PROGRESS_INTERVAL_S = 15.0
_HTTP_TIMEOUT_S = 5.0
_NUM_TAIL_LINES = 20
_BUSY = ("num_waiting", "num_running", "num_receiving", "num_sending")

# Without proxies, because the environment's proxy must not be used for the sweep's own server.
_open = urllib.request.build_opener(urllib.request.ProxyHandler({})).open


class ServerFailed(Exception):
    """The server did not start, died, or did not become idle; the text says why."""


class ServerJob:
    """The processes of one configuration. ``with`` starts them, waits, and ends them."""

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
        self._logs: list[tuple[Path, int]] = []  # each with the offset at which this job began

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
        """Send SIGTERM, then SIGKILL to processes left after a timeout or another Ctrl-C."""
        for child in self._children:
            child.signal(signal.SIGTERM)
        deadline_s = time.monotonic() + self._stop_timeout_s
        for child in self._children:
            child.end(max(0.0, deadline_s - time.monotonic()))
        self._children.clear()

    def wait_for(self, load: Child) -> int:
        """Wait for ``load`` and return its status. Raises ``ServerFailed`` if a server dies."""
        ended = first_ended([load, *self._children], None)
        if ended is not load:
            self.check()
        return load.status()

    def check(self) -> None:
        """Raise ``ServerFailed`` if a process of the server has ended."""
        ended = first_ended(self._children, 0)
        if ended is not None:
            raise ServerFailed(self._why(f"has ended with status {ended.status()}"))

    def wait_idle(self) -> None:
        """Wait until the replicas of our server have no requests.

        The load waits for all its answers, but replicas may still be freeing memory. Other servers
        have no ``/cluster`` and count as idle. Raises ``ServerFailed`` if requests are left after
        ``IDLE_TIMEOUT_S``.
        """
        deadline_s = time.monotonic() + IDLE_TIMEOUT_S
        for url in self.base_urls:
            while busy := _busy_replicas(url):
                if time.monotonic() > deadline_s:
                    raise ServerFailed(f"{url} is not idle after {IDLE_TIMEOUT_S:g} s: {busy}")
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
        started_s = printed_s = time.monotonic()
        waiting = list(self.base_urls)
        path = self._configuration.health_path
        while waiting := [url for url in waiting if not _is_healthy(url + path)]:
            self._pause(_HEALTH_INTERVAL_S)
            now_s = time.monotonic()
            if now_s - started_s > self._start_timeout_s:
                raise ServerFailed(self._why(f"is not healthy after {self._start_timeout_s:g} s"))
            if now_s - printed_s > _PROGRESS_INTERVAL_S:
                printed_s = now_s
                print(f"still starting after {now_s - started_s:.0f} s", flush=True)
        print(f"healthy after {time.monotonic() - started_s:.0f} s", flush=True)

    def _pause(self, seconds: float) -> None:
        """Wait, but raise ``ServerFailed`` at once if a process of the server ends."""
        first_ended(self._children, seconds)
        self.check()

    def _why(self, failure: str) -> str:
        parts = [f"{self._configuration.name} {failure}"]
        for path, start in self._logs:
            with path.open("rb") as log:
                log.seek(start)
                lines = log.read().decode(errors="replace").splitlines()
            parts += [f"end of {path}:", *lines[-_NUM_TAIL_LINES:]]
        return "\n".join(parts)


def commands(configuration: Configuration, ports: Sequence[int]) -> list[str]:
    """Return shell lines that start the configuration's processes."""
    lines = []
    for launch, port in zip(configuration.launches, ports, strict=True):
        changed = environment(launch).items() - os.environ.items()
        words = ["env", *(f"{name}={value}" for name, value in sorted(changed))]
        enter = f"cd {shlex.quote(str(launch.folder))} && " if launch.folder else ""
        lines.append(enter + shlex.join([*words, *with_port(launch, port)]))
    return lines


def with_port(launch: Launch, port: int) -> list[str]:
    """Return the command with its port filled in."""
    return [word.replace(PORT, str(port)) for word in launch.command]


def environment(launch: Launch) -> dict[str, str]:
    """Return the environment of a process: the sweep's, its GPUs, and the experiment's ``env``.

    Raises ``ServerFailed`` if fewer GPUs are visible here.
    """
    found = dict(os.environ)
    if launch.gpus is not None:
        visible = found.get("CUDA_VISIBLE_DEVICES")
        if visible is None:
            names = [str(index) for index in launch.gpus]
        else:
            names = visible.split(",")[launch.gpus.start : launch.gpus.stop]
            if visible and len(names) < len(launch.gpus):
                raise ServerFailed(f"{launch.gpus.stop} GPUs are needed, {visible} are visible")
        found["CUDA_VISIBLE_DEVICES"] = ",".join(names)
    return found | dict(launch.env)


def _free_ports(count: int, base_port: int | None) -> list[int]:
    """Find ports without a listener, because a listener would pass for the server under test."""
    with ExitStack() as stack:
        # All stay bound until the last is known, so that no port is returned twice.
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
    """Return the replicas of our server that have requests; [] for any other server."""
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
