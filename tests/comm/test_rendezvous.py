"""Rendezvous: what keeps one rank from starting ends the start of all, with the reason."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping

import pytest
from torch.distributed import HashStore  # type: ignore[attr-defined]

from serve.comm import rendezvous
from serve.comm.rendezvous import Rendezvous, StartError
from serve.topology import RankInfo

FACTS = {"--block-size": "16", "protocol": "abc"}


@pytest.fixture(autouse=True)
def _no_lingering(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rendezvous, "LINGER_S", 0.01)


def meet(
    world_size: int, act: Mapping[int, Callable[[Rendezvous], None]], timeout_s: float = 60.0
) -> dict[int, str]:
    """Run each rank's part in a thread; return the error of each rank, '' where there is none."""
    store, errors = HashStore(), {}

    def run(rank: int) -> None:
        part = Rendezvous(RankInfo(rank, world_size, rank, world_size), store, timeout_s)
        try:
            act[rank](part)
        except StartError as error:
            errors[rank] = str(error)
        else:
            errors[rank] = ""

    threads = [threading.Thread(target=run, args=(rank,)) for rank in act]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return errors


def arrive(**changes: str) -> Callable[[Rendezvous], None]:
    return lambda part: part.arrive(FACTS | changes)


def test_equal_ranks_meet() -> None:
    assert meet(4, dict.fromkeys(range(4), arrive())) == dict.fromkeys(range(4), "")


def test_one_rank_meets_itself() -> None:
    assert meet(1, {0: arrive()}) == {0: ""}


def test_an_error_of_one_rank_is_known_to_all() -> None:
    parts = {0: arrive(), 1: lambda part: part.report("there is no config.json"), 2: arrive()}
    errors = meet(3, parts)
    assert errors[0].endswith(": there is no config.json")
    assert errors[0].startswith("rank 1 on ")
    assert errors[2] == errors[0]
    assert errors[1] == ""  # it knows


def test_an_error_does_not_wait_for_a_rank_that_never_comes() -> None:
    errors = meet(3, {0: arrive(), 2: lambda part: part.report("no GPU")})
    assert "rank 2 on " in errors[0]


def test_a_difference_is_named() -> None:
    errors = meet(3, {0: arrive(), 1: arrive(), 2: arrive(protocol="xyz")})
    assert "rank 2 on " in errors[0]
    assert "has protocol xyz, rank 0 has abc" in errors[0]
    assert errors[1] == errors[2] == errors[0]


def test_missing_ranks_are_named() -> None:
    errors = meet(4, {0: arrive(), 2: arrive()}, timeout_s=0.5)
    assert errors[0] == "ranks 1, 3 did not start within 0.5 s"
    assert errors[2]


def test_a_missing_rank_0_is_noticed() -> None:
    assert meet(2, {1: arrive()}, timeout_s=0.2)[1].startswith("rank 0 gave no verdict")
