"""Server: a whole job under torchrun on a free port, its log, its ranks, and how to end it.

    with serving("--model", str(model), num_ranks=2) as server:
        requests.get(f"{server.url}/health")

Nothing here polls or sleeps. The log is a pipe that every rank holds open: its lines say how far
the job has come, and its end that no process is left.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress

import psutil

from serve.runtime.shutdown import signal_at_parent_death
from tests.support.paths import ROOT

START_S = 120.0  # several imports of torch share few cores
GONE_S = 20.0


class Server:
    """One job. Its methods may be called from any thread; the ones that wait take time limits."""

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
            preexec_fn=_die_with_tests,
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
        """Wait for a line in which ``pattern`` is found.

        ``AssertionError`` if the job ends without, or writes nothing for ``timeout_s``.
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
        """Wait until rank 0 answers HTTP, which is before it is ready; the URL."""
        self.url = self.wait_log(r"listening on (http://\S+)")[1]
        return self.url

    def wait_ready(self) -> None:
        """Wait until requests are taken."""
        self.wait_listening()
        self.wait_log(r"serve: ready:")
        self.rank_pids()

    def wait_gone(self, timeout_s: float = GONE_S) -> int:
        """Wait until no process of the job is left; torchrun's status."""
        with self._grown:
            in_time = self._grown.wait_for(lambda: self._ended, timeout_s)
        assert in_time, f"after {timeout_s} s these ranks are left: {self.rank_pids()}"
        return self.torchrun.wait(timeout_s)

    def wait_rank_gone(self, pid: int, timeout_s: float = GONE_S) -> None:
        """Wait until one process has ended. ``psutil.TimeoutExpired`` if it does not."""
        with suppress(psutil.NoSuchProcess):
            psutil.Process(pid).wait(timeout_s)

    def rank_pids(self) -> dict[int, int]:
        """The process of every rank that lives, by rank."""
        pids: dict[int, int] = {}
        with suppress(psutil.NoSuchProcess):
            for child in psutil.Process(self.torchrun.pid).children():
                with suppress(psutil.NoSuchProcess, psutil.ZombieProcess, psutil.AccessDenied):
                    if rank := child.environ().get("RANK"):
                        pids[int(rank)] = child.pid
        self._pids |= set(pids.values())
        return pids

    def signal_ranks(self, number: signal.Signals) -> None:
        """Signal every rank but not torchrun, whose status then tells how they have ended."""
        for pid in self.rank_pids().values():
            os.kill(pid, number)

    def kill(self) -> None:
        """End whatever is left. Every rank leads a process group of its own."""
        self.rank_pids()
        for pid in (self.torchrun.pid, *self._pids):
            with suppress(ProcessLookupError):
                os.killpg(pid, signal.SIGKILL)
        self.torchrun.wait(GONE_S)

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
    """A job that is killed at the end. When something fails its log is printed."""
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


def _die_with_tests() -> None:
    signal_at_parent_death(signal.SIGKILL)
