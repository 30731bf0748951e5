"""End a process: with its parent, on a signal, and without waiting for its threads."""

from __future__ import annotations

import asyncio
import ctypes
import logging
import os
import signal
import sys
from collections.abc import Callable, Coroutine
from typing import Any, NoReturn

_PR_SET_PDEATHSIG = 1


def signal_at_parent_death(number: signal.Signals) -> None:
    """Let the kernel send ``number`` to this process when its parent ends (prctl(2), Linux only).

    The setting is lost at fork and kept at exec, so it may be made in ``preexec_fn``.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, number)


def die_with_parent() -> None:
    """Under torchrun: get SIGHUP when torchrun ends, even if it was killed (Linux only).

    Exits at once if torchrun has ended already.
    """
    if sys.platform == "linux" and "TORCHELASTIC_RUN_ID" in os.environ:
        signal_at_parent_death(signal.SIGHUP)
        if os.getppid() == 1:
            os._exit(1)


def exit_now(code: int) -> NoReturn:
    """Flush the output and end the process with ``code``.

    An ordinary exit would wait for the reader threads, which are blocked in a receive.
    """
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


class StopSignals:
    """Whether the user has requested a stop, once or twice, by SIGTERM or Ctrl-C.

    At the first signal the server drains and stops; at the second it stops at once. Under torchrun
    every SIGINT counts as the first: torchrun passes Ctrl-C on (as SIGINT or SIGTERM, depending on
    its version), and the terminal sends it as well where the ranks share torchrun's session.

    Rank 0 stops the job. The other ranks pass the requests of their process on to it, because the
    torchrun of another host signals only them.
    """

    def __init__(self) -> None:
        self.first = asyncio.Event()
        self.second = asyncio.Event()
        self._num_terms = 0

    def install(self, on_orphaned: Callable[[], None]) -> None:
        """Handle the signals of this process; call ``on_orphaned`` when torchrun has ended."""
        loop = asyncio.get_running_loop()
        loop.add_signal_handler(signal.SIGTERM, self._on_term)
        loop.add_signal_handler(signal.SIGHUP, on_orphaned)
        interrupted = self.first.set if "TORCHELASTIC_RUN_ID" in os.environ else self._on_term
        loop.add_signal_handler(signal.SIGINT, interrupted)

    def request(self, at_once: bool) -> None:
        """Take in a request from another rank. It does not count as a signal of this process."""
        (self.second if at_once else self.first).set()

    async def pass_on(self, send: Callable[[bool], None]) -> None:
        """Call ``send(at_once)`` for each request to this process."""
        await self.first.wait()
        send(False)
        await self.second.wait()
        send(True)

    def _on_term(self) -> None:
        self._num_terms += 1
        self.request(at_once=self._num_terms > 1)


async def wait_for_either(first: asyncio.Task[None], second: Coroutine[Any, Any, Any]) -> None:
    """Wait until one of both ends, then cancel ``second``. ``first`` is the caller's to cancel."""
    other = asyncio.create_task(second)
    try:
        await asyncio.wait((first, other), return_when=asyncio.FIRST_COMPLETED)
    finally:
        other.cancel()
