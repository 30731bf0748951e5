"""World: a few processes joined by gloo that stay up between test cases.

    def case(factor: int) -> int:                # top level of a test module; runs on every rank
        dist.barrier()
        return dist.get_rank() * factor

    def test_case(world: World) -> None:
        assert world.run("tests.test_me:case", 3) == [0, 3, 6, 9]

The first run starts the processes. A case that fails, hangs or loses a rank ends them, and the next
run starts new ones, so that no state is left over.
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
import time
import traceback
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from serve.runtime.shutdown import signal_at_parent_death

FOLLOW_S = 5.0  # how long the other ranks may still run after one has failed
DIE_S = 5.0


class WorldError(Exception):
    """A case failed on some rank; the text has each rank's traceback or stacks."""


class _Answer(NamedTuple):
    done: bool
    value: Any  # the result or, if not done, the traceback


@dataclass(frozen=True, slots=True)
class _Rank:
    process: SpawnProcess
    connection: Connection[Any, Any]
    stacks: Path  # file with the stacks of its threads when it was aborted


class World:
    """``size`` processes with ranks from 0 that have set up torch.distributed with gloo."""

    def __init__(self, size: int = 4) -> None:
        self.size = size
        self._ranks: list[_Rank] = []
        self._store: object = None  # the ranks' rendezvous, held by the parent as torchrun does
        self._folder = tempfile.TemporaryDirectory(prefix="world-")

    def run(
        self, path: str, *args: Any, timeout_s: float = 60.0, dying: Collection[int] = ()
    ) -> list[Any]:
        """Call ``module:function`` with ``args`` on every rank and return the results by rank.

        Arguments and results are pickled. Ranks in ``dying`` must end their process, and their
        result is None. Raises ``WorldError`` if another rank raises, ends, or takes too long.
        """
        if not self._ranks:
            self._start()
        for rank in self._ranks:
            rank.connection.send((path, args))
        answers = self._gather(timeout_s, dying)
        failed = [
            rank for rank in range(self.size) if not _is_expected(answers.get(rank), rank in dying)
        ]
        text = ""
        if failed or dying:
            self._abort([rank for rank in range(self.size) if rank not in answers])
            text = "\n".join(self._describe(rank, answers.get(rank)) for rank in range(self.size))
            self.close()
        if failed:
            raise WorldError(f"{path} failed on ranks {failed}\n{text}")
        return [answers[rank].value for rank in range(self.size)]

    def close(self) -> None:
        """End the processes; a later run starts new ones."""
        for rank in self._ranks:
            rank.process.kill()
            rank.process.join()
            rank.connection.close()
        self._ranks = []
        self._store = None

    def _start(self) -> None:
        import torch.distributed as dist

        store = dist.TCPStore(  # type: ignore[attr-defined]
            "127.0.0.1", 0, is_master=True, wait_for_workers=False
        )
        spawn = multiprocessing.get_context("spawn")
        self._store = store
        for rank in range(self.size):
            parent_end, child_end = spawn.Pipe()
            stacks = Path(self._folder.name, f"{rank}.txt")
            environ = _environ(rank, self.size, store.port)
            process = spawn.Process(
                target=_serve_calls, args=(child_end, str(stacks), environ), daemon=True
            )
            process.start()
            child_end.close()
            self._ranks.append(_Rank(process, parent_end, stacks))

    def _gather(self, timeout_s: float, dying: Collection[int]) -> dict[int, _Answer]:
        """Collect the answers by rank, without ranks that did not answer in time."""
        answers: dict[int, _Answer] = {}
        waiting = {rank.connection: index for index, rank in enumerate(self._ranks)}
        deadline_s = time.monotonic() + timeout_s
        while waiting and (ready := wait(list(waiting), deadline_s - time.monotonic())):
            for connection in ready:
                assert isinstance(connection, Connection)
                rank = waiting.pop(connection)
                try:
                    answers[rank] = connection.recv()
                except (EOFError, ConnectionError):
                    answers[rank] = _Answer(False, None)
                if not _is_expected(answers[rank], rank in dying):
                    deadline_s = min(deadline_s, time.monotonic() + FOLLOW_S)
        return answers

    def _abort(self, ranks: list[int]) -> None:
        """End ``ranks``; each writes the stacks of its threads first."""
        processes = [self._ranks[rank].process for rank in ranks]
        for process in processes:
            if process.pid is not None and process.is_alive():
                os.kill(process.pid, signal.SIGABRT)
                os.kill(process.pid, signal.SIGCONT)  # a stopped process handles no signal
        for process in processes:
            process.join(DIE_S)

    def _describe(self, rank: int, answer: _Answer | None) -> str:
        if answer is None:
            stacks = self._ranks[rank].stacks.read_text()
            return f"--- rank {rank} was not done; its stacks are\n{stacks}"
        if answer.done:
            return f"--- rank {rank} was done"
        if answer.value is None:
            self._ranks[rank].process.join(DIE_S)
            return f"--- rank {rank} ended, exit code {self._ranks[rank].process.exitcode}"
        return f"--- rank {rank} raised\n{answer.value}"


@pytest.fixture(scope="session")
def world() -> Iterator[World]:
    world = World(4)
    yield world
    world.close()


def _is_expected(answer: _Answer | None, dying: bool) -> bool:
    if dying:
        return answer == _Answer(False, None)
    return answer is not None and answer.done


# --- in the processes ---------------------------------------------------------------------------


def _environ(rank: int, size: int, port: int) -> dict[str, str]:
    """Return the variables that torchrun sets on one host."""
    return {
        "RANK": str(rank),
        "WORLD_SIZE": str(size),
        "LOCAL_RANK": str(rank),
        "LOCAL_WORLD_SIZE": str(size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "TORCHELASTIC_RESTART_COUNT": "0",
        "OMP_NUM_THREADS": "1",
    }


def _serve_calls(connection: Connection[Any, Any], stacks: str, environ: dict[str, str]) -> None:
    """Join the world, then answer calls until the parent closes the connection."""
    signal_at_parent_death(signal.SIGKILL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    sys.setswitchinterval(1e-4)
    os.environ.update(environ)
    with open(stacks, "w") as file:
        faulthandler.enable(file)
        joined = _call("tests.support.world:_join", ())
        if not joined.done:
            connection.send(joined)
            return
        while True:
            try:
                path, args = connection.recv()
            except EOFError:
                return
            answer = _call(path, args)
            try:
                connection.send(answer)
            except Exception:  # the result cannot be pickled
                connection.send(_Answer(False, traceback.format_exc()))


def _join() -> None:
    from serve.comm.process_groups import init_world
    from serve.topology import read_rank_info

    init_world(read_rank_info(os.environ), "cpu")


def _call(path: str, args: tuple[Any, ...]) -> _Answer:
    module, _, name = path.partition(":")
    try:
        return _Answer(True, getattr(importlib.import_module(module), name)(*args))
    except BaseException:
        return _Answer(False, traceback.format_exc())
