"""PlanProgress: what of the plan is in flight on this rank, and for how long it stands still.

An entry is in flight while the GPU thread issues it, and a step or a receive until its result is
there. The GPU thread and the waiter threads write, the event loop reads. Every write is a single
assignment or a single operation of a built-in container, so there is no lock.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field

from serve.protocol.messages import Stall
from serve.protocol.plan import Entry, PostReceive, Step

Work = Entry | Callable[[], None]


@dataclass(eq=False, slots=True)
class _Waiting:
    """An entry that is issued, and whose result is not there yet."""

    entry: Entry
    since_s: float


@dataclass(slots=True)
class _Lane:
    """Entries whose results come one after another: the steps, or the receives of one link."""

    waiting: dict[_Waiting, None] = field(default_factory=dict)  # oldest first
    last_result_s: float = 0.0


class PlanProgress:
    """Counts the completed entries and times those in flight.

    ``senders`` are the ranks that send pushes, by prefill replica: a receive may wait for them.
    """

    def __init__(
        self,
        senders: dict[int, tuple[int, ...]],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.num_completed = 0
        self._senders = senders
        self._clock = clock
        self._issuing: Work | None = None
        self._advanced_s = 0.0
        self._lanes: dict[Hashable, _Lane] = {}

    @property
    def is_busy(self) -> bool:
        """Whether an entry is in flight."""
        return self._issuing is not None or any(lane.waiting for lane in self._lanes.values())

    def begin(self, work: Work) -> None:
        """Note that the GPU thread begins to issue ``work``."""
        self._advanced_s = self._clock()
        self._issuing = work

    def advance(self) -> None:
        """Note that the work being issued is not stuck: a layer is computed, a tensor is loaded."""
        self._advanced_s = self._clock()

    def end(self) -> None:
        """Note that the GPU thread has issued the work."""
        self._issuing = None
        self.num_completed += 1

    def wait_for(self, entry: Entry) -> Callable[[], None]:
        """Note that the result of ``entry`` is awaited; the returned function notes the result."""
        key = ("receive", entry.prefill_replica) if isinstance(entry, PostReceive) else "step"
        lane = self._lanes.setdefault(key, _Lane())
        waiting = _Waiting(entry, self._clock())
        lane.waiting[waiting] = None

        def note_result() -> None:
            lane.last_result_s = self._clock()
            del lane.waiting[waiting]
            self.num_completed += 1

        return note_result

    def restart_clocks(self) -> None:
        """Count no time before now, because this whole process did not run for a while."""
        self._advanced_s = self._clock()
        for lane in self._lanes.values():
            lane.last_result_s = self._clock()

    def stalls(self, older_than_s: float) -> list[Stall]:
        """Return what has been in flight without progress for at least ``older_than_s``."""
        now_s = self._clock()
        found = []
        if (work := self._issuing) is not None:
            is_start = not isinstance(work, Entry)
            found.append(Stall(_describe(work), now_s - self._advanced_s, is_start=is_start))
        for lane in self._lanes.values():
            oldest = next(iter(lane.waiting.copy()), None)
            if oldest is not None:
                age_s = now_s - max(oldest.since_s, lane.last_result_s)
                found.append(Stall(_describe(oldest.entry), age_s, self._peers(oldest.entry)))
        return [stall for stall in found if stall.age_s >= older_than_s]

    def _peers(self, entry: Entry) -> tuple[int, ...]:
        if isinstance(entry, PostReceive):
            return self._senders.get(entry.prefill_replica, ())
        return ()


def _describe(work: Work) -> str:
    match work:
        case Step(sequences):
            num_tokens = sum(len(sequence.token_ids) for sequence in sequences)
            return f"a step of {len(sequences)} sequences and {num_tokens} tokens"
        case PostReceive(prefill_replica, number):
            return f"the receive of push {number} from replica {prefill_replica}"
    return f"the entry {type(work).__name__}" if isinstance(work, Entry) else "its start"
