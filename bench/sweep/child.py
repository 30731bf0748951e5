"""Child: a process in its own session, ended together with every process that it started.

torchrun's ranks lead their own process groups, and other servers start further processes, but all
of them stay in the session. Its members are read from /proc before its leader is reaped. Until
then the leader's pid, which is also the session's id, cannot be given to another process.
"""

from __future__ import annotations

import os
import select
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import IO

from serve.runtime.shutdown import signal_at_parent_death

KILL_TIMEOUT_S = 10.0  # a killed process may take long to free its GPU memory and end


class Child:
    """One process and every process that it starts. Raises ``OSError`` if it cannot be started.

    Its stdout and stderr go to ``log``; without one they go where the sweep's own go. The process
    gets SIGTERM when the sweep dies.
    """

    def __init__(
        self,
        command: Sequence[str],
        folder: Path | None,
        env: Mapping[str, str] | None = None,
        log: IO[bytes] | None = None,
    ) -> None:
        self._process = subprocess.Popen(
            command,
            cwd=folder,
            env=env,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,  # Ctrl-C reaches only the sweep, which then ends its children
            preexec_fn=_end_with_parent,
        )
        # It becomes readable when the process has ended, before it is reaped.
        self.pidfd = os.pidfd_open(self._process.pid)

    def signal(self, number: signal.Signals) -> None:
        """Signal the process itself, if it has not ended."""
        with suppress(ProcessLookupError):
            signal.pidfd_send_signal(self.pidfd, number)

    def status(self) -> int:
        """Return the exit status of an ended process, or minus the signal that ended it."""
        found = os.waitid(os.P_PIDFD, self.pidfd, os.WEXITED | os.WNOWAIT)
        assert found is not None
        return found.si_status if found.si_code == os.CLD_EXITED else -found.si_status

    def end(self, timeout_s: float) -> None:
        """Wait for the process, kill the rest of its session, reap it. Call this only once.

        Another Ctrl-C ends the wait early.
        """
        with suppress(KeyboardInterrupt):
            first_ended([self], timeout_s)
        _kill_session(self._process.pid)
        self._process.wait()
        os.close(self.pidfd)


def first_ended(children: Sequence[Child], timeout_s: float | None) -> Child | None:
    """Wait at most ``timeout_s`` until one of ``children`` has ended, and return the first."""
    by_fd = {child.pidfd: child for child in children}
    ended = _poll(list(by_fd), timeout_s)
    return next((child for fd, child in by_fd.items() if fd in ended), None)


def _poll(pidfds: Sequence[int], timeout_s: float | None) -> set[int]:
    poll = select.poll()
    for pidfd in pidfds:
        poll.register(pidfd, select.POLLIN)
    return {pidfd for pidfd, _ in poll.poll(None if timeout_s is None else timeout_s * 1e3)}


def _kill_session(session: int) -> None:
    """Kill every process of a session whose leader has not been reaped."""
    deadline_s = time.monotonic() + KILL_TIMEOUT_S
    while members := _open_members(session):
        try:
            for pidfd in members.values():
                with suppress(ProcessLookupError):
                    signal.pidfd_send_signal(pidfd, signal.SIGKILL)
            for pidfd in members.values():
                _poll([pidfd], max(0.0, deadline_s - time.monotonic()))
        finally:
            for pidfd in members.values():
                os.close(pidfd)
        if time.monotonic() > deadline_s:
            raise TimeoutError(f"processes {sorted(members)} did not end after SIGKILL")


def _open_members(session: int) -> dict[int, int]:
    """Open a pidfd for each running process of the session; return them by pid."""
    found = {}
    for entry in os.scandir("/proc"):
        if not entry.name.isdigit() or _session_of(entry.name) != session:
            continue
        with suppress(ProcessLookupError):
            pidfd = os.pidfd_open(int(entry.name))
            # The pid may have been given to another process in between.
            if _session_of(entry.name) == session:
                found[int(entry.name)] = pidfd
            else:
                os.close(pidfd)
    return found


def _session_of(pid: str) -> int | None:
    """Return the session of a running process; None if it has ended."""
    try:
        stat = Path("/proc", pid, "stat").read_text(errors="replace")
    except (FileNotFoundError, ProcessLookupError):
        return None
    # The name may contain anything. After it: state, parent, process group, session (proc(5)).
    state, _, _, session = stat.rpartition(")")[2].split()[:4]
    return None if state in "ZX" else int(session)


def _end_with_parent() -> None:
    signal_at_parent_death(signal.SIGTERM)
