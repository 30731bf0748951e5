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
        for how, text in (({1: "raise"}, "of my own"), ({0: "exit"}, "exit code 3")):
            with pytest.raises(WorldError, match=text):
                world.run(f"{MODULE}:misbehave", how)
            assert world.run(f"{MODULE}:misbehave", {}) == [0, 1]
        with pytest.raises(WorldError, match=r"(?s)rank 0 was not done.*in misbehave.*rank 1 was"):
            world.run(f"{MODULE}:misbehave", {0: "hang", 1: "stop"}, timeout_s=0.5)
        assert world.run(f"{MODULE}:misbehave", {0: "exit"}, dying=[0]) == [None, 1]
        with pytest.raises(WorldError, match=r"failed on ranks \[0\]"):
            world.run(f"{MODULE}:misbehave", {}, dying=[0])
    finally:
        world.close()
