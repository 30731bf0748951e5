"""How a rank's process ends: with its parent, on a signal, and never by waiting for threads."""

from __future__ import annotations

import asyncio
import ctypes
import logging
import os
import signal
import sys
from collections.abc import Callable
from typing import NoReturn

_PR_SET_PDEATHSIG = 1


def die_with_parent() -> None:
    """Get SIGHUP when torchrun is gone, also when it was killed (Linux)."""
    if sys.platform == "linux" and "TORCHELASTIC_RUN_ID" in os.environ:
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGHUP)
        if os.getppid() == 1:  # it was gone already
            os._exit(1)


def exit_now(code: int) -> NoReturn:
    """Flush and end: reader threads blocked in a receive would hold up an ordinary exit."""
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


class StopSignals:
    """SIGTERM or Ctrl-C: drain and stop. The same once more: stop.

    torchrun passes Ctrl-C on, as SIGINT or SIGTERM by its version, and where ranks share its
    session the terminal does, too. So under torchrun any number of SIGINTs ask for the first stop.
    """

    def __init__(self) -> None:
        self.first = asyncio.Event()
        self.second = asyncio.Event()
        self._num_terms = 0

    def install(self, on_orphaned: Callable[[], None]) -> None:
        """Take over the signals of this process; ``on_orphaned`` is called when torchrun dies."""
        loop = asyncio.get_running_loop()
        loop.add_signal_handler(signal.SIGTERM, self._on_term)
        loop.add_signal_handler(signal.SIGHUP, on_orphaned)
        interrupted = self.first.set if "TORCHELASTIC_RUN_ID" in os.environ else self._on_term
        loop.add_signal_handler(signal.SIGINT, interrupted)

    def _on_term(self) -> None:
        self._num_terms += 1
        (self.first if self._num_terms == 1 else self.second).set()
