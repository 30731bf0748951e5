"""Progress: what counts as stuck, from the entries of a rank to rank 0's verdict."""

from __future__ import annotations

import pytest

from serve.engine.plan_progress import PlanProgress
from serve.protocol.messages import Heartbeat, Stall
from serve.protocol.plan import Entry, PostReceive, Step, StepSequence, Unpack
from serve.runtime.progress import PEER_ENTRIES, ProgressWatch


class Clock:
    """A clock that only the test advances."""

    def __init__(self) -> None:
        self.now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def progress(clock: Clock) -> PlanProgress:
    return PlanProgress({0: (0, 1), 2: (4,)}, clock)


STEP = Step((StepSequence(0, (1, 2, 3), (0,), True), StepSequence(7, (4,), (1,), True)))


def beat(progress: PlanProgress) -> Heartbeat:
    return Heartbeat(progress.num_completed, progress.is_busy, tuple(progress.stalls(1.0)))


def test_an_entry_that_the_gpu_thread_cannot_end_ages(clock: Clock, progress: PlanProgress) -> None:
    progress.begin(STEP)
    clock.now_s += 61
    assert progress.stalls(1.0) == [Stall("a step of 2 sequences and 4 tokens", 61.0)]
    assert progress.is_busy
    progress.end()
    assert progress.stalls(1.0) == []
    assert (progress.num_completed, progress.is_busy) == (1, False)


def test_layers_of_a_long_step_count(clock: Clock, progress: PlanProgress) -> None:
    progress.begin(STEP)
    for _ in range(40):
        clock.now_s += 50
        progress.advance()
        assert max((stall.age_s for stall in progress.stalls(0.0)), default=0.0) < 60


def test_loading_is_marked_as_start(clock: Clock, progress: PlanProgress) -> None:
    progress.begin(lambda: None)
    clock.now_s += 5
    assert progress.stalls(1.0) == [Stall("its start", 5.0, (), True)]


def test_a_step_ages_from_the_result_before_it(clock: Clock, progress: PlanProgress) -> None:
    first, second = progress.wait_for(STEP), progress.wait_for(STEP)
    clock.now_s += 50
    first()
    clock.now_s += 20
    assert [stall.age_s for stall in progress.stalls(1.0)] == [20.0]
    second()
    assert progress.stalls(1.0) == []
    assert progress.num_completed == 2


def test_each_link_has_a_clock_of_its_own(clock: Clock, progress: PlanProgress) -> None:
    """Pushes of one replica that arrive do not hide that another replica's do not."""
    progress.wait_for(PostReceive(0, 17, 3))
    for number in range(10):
        clock.now_s += 10
        progress.wait_for(PostReceive(2, number, 3))()
        progress.begin(Unpack(2, number, ()))
        progress.end()
    stall = Stall("the receive of push 17 from replica 0", 100.0, (0, 1))
    assert progress.stalls(1.0) == [stall]


def test_a_pause_of_the_whole_process_is_no_stall(clock: Clock, progress: PlanProgress) -> None:
    entries: list[Entry] = [STEP, PostReceive(0, 1, 1)]
    for entry in entries:
        progress.wait_for(entry)
    progress.begin(STEP)
    clock.now_s += 1000
    progress.restart_clocks()
    assert progress.stalls(1.0) == []


# --- rank 0's verdict -----------------------------------------------------------------------------


def watch() -> ProgressWatch:
    return ProgressWatch(progress_timeout_s=60.0, start_timeout_s=600.0)


def test_a_stuck_step_is_named_although_others_progress() -> None:
    judge = watch()
    for count in range(61):
        assert judge.on_heartbeat(0, Heartbeat(count, True)) is None
        stall = Stall("a step of 2 sequences and 4 tokens", float(count))
        reason = judge.on_heartbeat(1, Heartbeat(5, True, (stall,)))
        assert (reason is None) == (count < 60)
    assert reason == (
        "rank 1 has made no progress with a step of 2 sequences and 4 tokens for 60 s"
    )


def test_ranks_that_wait_with_it_are_listed() -> None:
    judge = watch()
    judge.on_heartbeat(3, Heartbeat(5, True, (Stall("a step of 1 sequences and 1 tokens", 59.0),)))
    reason = judge.on_heartbeat(2, Heartbeat(5, True, (Stall("the entry Unpack", 60.0),)))
    assert reason is not None
    assert reason.startswith("rank 2 has made no progress with the entry Unpack for 60 s; rank 3 ")


def test_a_start_has_its_own_limit() -> None:
    judge = watch()
    assert judge.on_heartbeat(1, Heartbeat(0, True, (Stall("its start", 599.0, (), True),))) is None
    assert judge.on_heartbeat(1, Heartbeat(0, True, (Stall("its start", 600.0, (), True),)))


def test_a_receive_is_excused_while_its_sender_works_towards_it() -> None:
    """On a CPU the sender may have two long steps to compute first."""
    judge = watch()
    receive = "the receive of push 3 from replica 0"

    def reason_after(age_s: float, completed: int, busy: bool) -> str | None:
        judge.on_heartbeat(0, Heartbeat(completed, busy))
        return judge.on_heartbeat(1, Heartbeat(9, True, (Stall(receive, age_s, (0,)),)))

    assert reason_after(1.0, 100, True) is None
    assert reason_after(70.0, 100, True) is None  # a long step
    assert reason_after(200.0, 100 + PEER_ENTRIES - 1, True) is None
    assert reason_after(201.0, 100 + PEER_ENTRIES, True) is not None  # it works on, without it


def test_a_receive_from_an_idle_sender_is_stuck() -> None:
    judge = watch()
    judge.on_heartbeat(0, Heartbeat(100, False))
    stall = Stall("the receive of push 3 from replica 0", 60.0, (0,))
    assert judge.on_heartbeat(1, Heartbeat(9, True, (stall,))) is not None


def test_each_push_gets_an_excuse_of_its_own() -> None:
    judge = watch()
    for number in range(5):
        judge.on_heartbeat(0, Heartbeat(100 * number, True))
        stall = Stall(f"the receive of push {number} from replica 0", 61.0, (0,))
        assert judge.on_heartbeat(1, Heartbeat(number, True, (stall,))) is None
