"""Server: a whole job under torchrun on a free port, with its log and its ranks' processes.

    with serving("--model", str(model), num_ranks=2) as server:
        requests.get(f"{server.url}/health")

Nothing here polls or sleeps. The log is a pipe that every rank holds open: its lines show the
progress of the job, and its end shows that every process has exited.
"""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress

import psutil

from serve.runtime.shutdown import signal_at_parent_death
from tests.support.paths import ROOT

START_S = 120.0  # the ranks import torch at the same time, on few cores
EXIT_S = 20.0


def free_port() -> int:
    """Return a port that nothing listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Server:
    """One job. Its methods may be called from any thread. Those that wait have time limits."""

    def __init__(self, options: Sequence[str], num_ranks: int, entry: str) -> None:
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        ranks = ["--nproc-per-node", str(num_ranks), "-m", entry, "--port", "0", *options]
        self.command = [*torchrun, *ranks]
        self.url = ""  # known once it listens
        self.torchrun = subprocess.Popen(
            self.command,
            cwd=ROOT,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"},
            start_new_session=True,
            preexec_fn=_die_with_parent,
        )
        self._lines: list[str] = []
        self._ended = False
        self._grown = threading.Condition()
        self._pids: set[int] = set()  # of ranks seen so far
        threading.Thread(target=self._read_log, name="log", daemon=True).start()

    @property
    def log(self) -> str:
        """Everything that torchrun and the ranks have written so far."""
        with self._grown:
            return "\n".join(self._lines)

    def wait_log(self, pattern: str, timeout_s: float = START_S) -> re.Match[str]:
        """Wait for a line that ``pattern`` matches and return the match.

        Raises ``AssertionError`` if the job ends without such a line or writes no line for
        ``timeout_s``.
        """
        seen = 0
        with self._grown:
            while True:
                for line in self._lines[seen:]:
                    if found := re.search(pattern, line):
                        return found
                seen = len(self._lines)
                assert not self._ended, f"the job ended without a line like {pattern!r}"
                in_time = self._grown.wait(timeout_s)  # of silence
                assert in_time, f"no line like {pattern!r}, and {timeout_s} s of silence"

    def wait_listening(self) -> str:
        """Wait until rank 0 answers HTTP, before the job is ready, and return its URL."""
        self.url = self.wait_log(r"listening on (http://\S+)")[1]
        return self.url

    def wait_ready(self) -> None:
        """Wait until the job accepts requests."""
        self.wait_listening()
        self.wait_log(r"serve: ready:")
        self.rank_pids()

    def wait_exited(self, timeout_s: float = EXIT_S) -> int:
        """Wait until every process of the job has exited and return torchrun's exit status."""
        with self._grown:
            in_time = self._grown.wait_for(lambda: self._ended, timeout_s)
        assert in_time, f"after {timeout_s} s these ranks still run: {self.rank_pids()}"
        return self.torchrun.wait(timeout_s)

    def wait_rank_exited(self, pid: int, timeout_s: float = EXIT_S) -> None:
        """Wait until one process has exited. Raises ``psutil.TimeoutExpired`` if it does not."""
        with suppress(psutil.NoSuchProcess):
            psutil.Process(pid).wait(timeout_s)

    def rank_pids(self) -> dict[int, int]:
        """Return the process id of every running rank, by rank."""
        pids: dict[int, int] = {}
        with suppress(psutil.NoSuchProcess):
            for child in psutil.Process(self.torchrun.pid).children():
                with suppress(psutil.NoSuchProcess, psutil.ZombieProcess, psutil.AccessDenied):
                    if rank := child.environ().get("RANK"):
                        pids[int(rank)] = child.pid
        self._pids |= set(pids.values())
        return pids

    def signal_ranks(self, number: signal.Signals) -> None:
        """Signal every rank but not torchrun, whose exit status then reports how they ended."""
        for pid in self.rank_pids().values():
            os.kill(pid, number)

    def kill(self) -> None:
        """Kill every process that still runs. Each rank leads its own process group."""
        self.rank_pids()
        for pid in (self.torchrun.pid, *self._pids):
            with suppress(ProcessLookupError):
                os.killpg(pid, signal.SIGKILL)
        self.torchrun.wait(EXIT_S)

    def _read_log(self) -> None:
        assert self.torchrun.stdout is not None
        for line in self.torchrun.stdout:
            with self._grown:
                self._lines.append(line.decode(errors="replace").rstrip("\n"))
                self._grown.notify_all()
        with self._grown:
            self._ended = True
            self._grown.notify_all()


@contextmanager
def serving(
    *options: str, num_ranks: int, ready: bool = True, entry: str = "serve.launch"
) -> Iterator[Server]:
    """Start a job and kill it at the end. If the block raises, print the job's log."""
    server = Server(options, num_ranks, entry)
    try:
        if ready:
            server.wait_ready()
        yield server
    except BaseException:
        print(f"--- {' '.join(server.command)}\n{server.log}")
        raise
    finally:
        server.kill()


def _die_with_parent() -> None:
    signal_at_parent_death(signal.SIGKILL)
