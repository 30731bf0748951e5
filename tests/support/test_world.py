"""World: a failed case is reported for every rank and leaves no state behind."""

from __future__ import annotations

import os
import signal
import threading

import pytest
import torch.distributed as dist

from tests.support.world import World, WorldError

MODULE = "tests.support.test_world"


def misbehave(how: dict[int, str]) -> int:
    match how.get(dist.get_rank()):
        case "raise":
            raise ValueError("of my own")
        case "hang":
            threading.Event().wait()
        case "exit":
            os._exit(3)
        case "stop":
            os.kill(os.getpid(), signal.SIGSTOP)
    return dist.get_rank()


def test_a_failed_case_is_reported_and_leaves_no_state() -> None:
    world = World(2)
    try:
        with pytest.raises(WorldError, match=r"(?s)exit code 3.*of my own"):
            world.run(f"{MODULE}:misbehave", {0: "exit", 1: "raise"})
        assert world.run(f"{MODULE}:misbehave", {}) == [0, 1]
        with pytest.raises(WorldError, match=r"(?s)rank 0 was not done.*in misbehave.*rank 1 was"):
            world.run(f"{MODULE}:misbehave", {0: "hang", 1: "stop"}, timeout_s=0.5)
        assert world.run(f"{MODULE}:misbehave", {0: "exit"}, dying=[0]) == [None, 1]
    finally:
        world.close()


def test_a_rank_that_should_end_and_does_not_is_reported() -> None:
    world = World(1)
    try:
        with pytest.raises(WorldError, match=r"failed on ranks \[0\]"):
            world.run(f"{MODULE}:misbehave", {}, dying=[0])
    finally:
        world.close()
