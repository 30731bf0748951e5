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
    """SIGTERM once: drain and stop. Twice: stop. Ctrl-C counts where no torchrun passes it on."""

    def __init__(self) -> None:
        self.first = asyncio.Event()
        self.second = asyncio.Event()

    def install(self, on_orphaned: Callable[[], None]) -> None:
        """Take over the signals of this process; ``on_orphaned`` is called when torchrun dies."""
        loop = asyncio.get_running_loop()
        loop.add_signal_handler(signal.SIGTERM, self._stop)
        loop.add_signal_handler(signal.SIGHUP, on_orphaned)
        # On Ctrl-C the terminal signals the ranks too, and torchrun then sends SIGTERM.
        interrupted = (lambda: None) if "TORCHELASTIC_RUN_ID" in os.environ else self._stop
        loop.add_signal_handler(signal.SIGINT, interrupted)

    def _stop(self) -> None:
        (self.second if self.first.is_set() else self.first).set()
