"""World: a few processes joined by gloo, which live on from one test case to the next.

    def case(size: int) -> int:                  # top level of a test module; runs on every rank
        dist.barrier()
        return dist.get_rank() * size

    def test_case(world: World) -> None:
        assert world.run("tests.test_me:case", 3) == [0, 3, 6, 9]

The processes start with the first run. A case that fails, hangs or loses a rank ends them, and the
next run starts new ones, so that it finds nothing of the last.
"""

from __future__ import annotations

import faulthandler
import importlib
import multiprocessing
import os
import resource
import signal
import sys
import tempfile
import traceback
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from pathlib import Path
from typing import Any

import pytest

SECONDS_TO_FOLLOW = 5.0  # how long the others may take to end by themselves after one has failed
SECONDS_TO_DIE = 5.0


class WorldError(Exception):
    """A case failed on some rank; the text has what each rank raised, or where it stood."""


@dataclass
class _Rank:
    process: SpawnProcess
    connection: Connection
    stacks: Path  # written by the process when it is aborted


class World:
    """``size`` processes of rank 0 to ``size - 1``, torch.distributed set up, backend gloo."""

    def __init__(self, size: int = 4) -> None:
        self.size = size
        self._ranks: list[_Rank] = []
        self._store: object = None  # as torchrun's agent: the ranks meet here
        self._folder = tempfile.TemporaryDirectory(prefix="world-")

    def run(
        self, path: str, *args: Any, timeout_s: float = 60.0, dying: Collection[int] = ()
    ) -> list[Any]:
        """Call ``module:function`` with ``args`` on every rank; the results by rank.

        Arguments and results are pickled. Ranks in ``dying`` are expected to end their process;
        their result is None. Raises ``WorldError`` if any other rank raises, ends, or is not done
        after ``timeout_s``.
        """
        if not self._ranks:
            self._start()
        for rank in self._ranks:
            rank.connection.send((path, args))
        answers = self._gather(timeout_s, set(dying))
        failures = {
            rank: answers.get(rank, (False, None))[1]
            for rank in range(self.size)
            if rank not in dying and not answers.get(rank, (False, None))[0]
        }
        if not failures and not dying:
            return [answers[rank][1] for rank in range(self.size)]
        self.close()
        if failures:
            raise WorldError(self._describe(path, failures))
        return [answers[rank][1] if rank in answers else None for rank in range(self.size)]

    def close(self) -> None:
        """End the processes; a later run starts new ones."""
        for rank in self._ranks:
            rank.connection.close()  # an idle process ends at this
            if rank.process.is_alive():
                os.kill(rank.process.pid or 0, signal.SIGCONT)  # a stopped one takes no signal
                rank.process.kill() if not rank.stacks.exists() else os.kill(
                    rank.process.pid or 0, signal.SIGABRT
                )
        for rank in self._ranks:
            rank.process.join(SECONDS_TO_DIE)
            if rank.process.is_alive():
                rank.process.kill()
                rank.process.join()
        self._ranks, self._dead = [], self._ranks
        self._store = None

    def _start(self) -> None:
        from torch.distributed import TCPStore

        store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        spawn = multiprocessing.get_context("spawn")
        self._store = store
        for rank in range(self.size):
            ours, theirs = spawn.Pipe()
            stacks = Path(self._folder.name) / f"{os.urandom(4).hex()}-{rank}"
            process = spawn.Process(
                target=_live, args=(theirs, str(stacks), rank, self.size, store.port), daemon=True
            )
            process.start()
            theirs.close()
            self._ranks.append(_Rank(process, ours, stacks))
