"""Child: a process in a session of its own, that is ended together with all that it started.

torchrun's ranks lead process groups of their own, and other servers start helpers, but all of them
stay in the session. Who is in it is read from /proc before the leader is reaped: until then its
number, which is the session's, cannot belong to anybody else.
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

GONE_S = 10.0  # that a killed process may take to be gone; its GPU memory is free only then


class Child:
    """One process and what it starts. ``OSError`` if it cannot be started.

    ``log`` takes its stdout and stderr; without one they go where the sweep's own go. It gets
    SIGTERM when the sweep dies.
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
            start_new_session=True,  # Ctrl-C reaches the sweep only, which then ends the others
            preexec_fn=_end_with_parent,
        )
        # Readable once the process has ended, also before it is reaped.
        self.pidfd = os.pidfd_open(self._process.pid)

    def signal(self, number: signal.Signals) -> None:
        """Signal the process itself, if it lives."""
        with suppress(ProcessLookupError):
            signal.pidfd_send_signal(self.pidfd, number)

    def status(self) -> int:
        """The exit status of a process that has ended; negative: the signal that ended it."""
        found = os.waitid(os.P_PIDFD, self.pidfd, os.WEXITED | os.WNOWAIT)
        assert found is not None
        return found.si_status if found.si_code == os.CLD_EXITED else -found.si_status

    def end(self, timeout_s: float) -> None:
        """Wait for the process, kill what is left of its session, reap it. Only once.

        Another Ctrl-C ends the waiting.
        """
        with suppress(KeyboardInterrupt):
            first_ended([self], timeout_s)
        _kill_session(self._process.pid)
        self._process.wait()
        os.close(self.pidfd)


def first_ended(children: Sequence[Child], timeout_s: float | None) -> Child | None:
    """The first of ``children`` that has ended; waits for one, at most ``timeout_s``."""
    by_fd = {child.pidfd: child for child in children}
    ended = _poll(list(by_fd), timeout_s)
    return next((child for fd, child in by_fd.items() if fd in ended), None)


def _poll(pidfds: Sequence[int], timeout_s: float | None) -> set[int]:
    poll = select.poll()
    for pidfd in pidfds:
        poll.register(pidfd, select.POLLIN)
    return {pidfd for pidfd, _ in poll.poll(None if timeout_s is None else timeout_s * 1e3)}


def _kill_session(session: int) -> None:
    """SIGKILL to every process of a session whose leader has not been reaped."""
    deadline_s = time.monotonic() + GONE_S
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
            raise TimeoutError(f"processes {sorted(members)} do not end though they were killed")


def _open_members(session: int) -> dict[int, int]:
    """A pidfd for each living process of the session, by its number."""
    found = {}
    for entry in os.scandir("/proc"):
        if not entry.name.isdigit() or _session_of(entry.name) != session:
            continue
        with suppress(ProcessLookupError):
            pidfd = os.pidfd_open(int(entry.name))
            # Its number may have passed to another process in between.
            if _session_of(entry.name) == session:
                found[int(entry.name)] = pidfd
            else:
                os.close(pidfd)
    return found


def _session_of(pid: str) -> int | None:
    """The session of a living process; None of one that has ended."""
    try:
        stat = Path("/proc", pid, "stat").read_text(errors="replace")
    except (FileNotFoundError, ProcessLookupError):
        return None
    # After the name, which may hold anything: state, parent, process group, session (proc(5)).
    state, _, _, session = stat.rpartition(")")[2].split()[:4]
    return None if state in "ZX" else int(session)


def _end_with_parent() -> None:
    signal_at_parent_death(signal.SIGTERM)
