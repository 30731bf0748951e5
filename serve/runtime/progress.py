"""ProgressWatch: whether the work of the job moves, from the heartbeats of all ranks. Pure.

A rank whose event loop runs may still be stuck: in a kernel, a collective or a transfer. Every rank
measures for how long each piece of its work has stood still, and sends that with its heartbeats.
Time in a queue is not counted.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from serve.protocol.messages import Heartbeat, Stall

# A transfer or an acknowledgement waits behind the entries that its peer has queued: two steps and
# the entries between them. On a CPU each may take long. So a peer that works may complete this many
# before it is overdue.
PEER_ENTRIES = 32


@dataclass(slots=True)
class _RankState:
    heartbeat: Heartbeat = field(default_factory=Heartbeat)
    # By the text of a stall that waits for peers: their completed entries when it was first seen.
    counts: dict[str, dict[int, int]] = field(default_factory=dict)


class ProgressWatch:
    """The newest heartbeat of every rank, and what has stood still for too long."""

    def __init__(self, progress_timeout_s: float, start_timeout_s: float) -> None:
        self._progress_timeout_s = progress_timeout_s
        self._start_timeout_s = start_timeout_s
        self._ranks: dict[int, _RankState] = {}

    def on_heartbeat(self, rank: int, heartbeat: Heartbeat) -> str | None:
        """Take in a heartbeat. Return why the job must end, or None."""
        state = self._ranks.setdefault(rank, _RankState())
        state.heartbeat = heartbeat
        state.counts = {
            stall.what: state.counts.get(stall.what) or self._count(stall.peers)
            for stall in heartbeat.stalls
        }
        stuck = [s for s in heartbeat.stalls if self._is_stuck(state, s)]
        if not stuck:
            return None
        others = [
            _describe(other, other_state.heartbeat.stalls)
            for other, other_state in sorted(self._ranks.items())
            if other != rank and other_state.heartbeat.stalls
        ]
        return "; ".join([_describe(rank, stuck), *others])

    def _count(self, ranks: Sequence[int]) -> dict[int, int]:
        return {rank: self._heartbeat(rank).num_completed for rank in ranks}

    def _is_stuck(self, state: _RankState, stall: Stall) -> bool:
        limit_s = self._start_timeout_s if stall.is_start else self._progress_timeout_s
        if stall.age_s < limit_s:
            return False
        return not any(
            self._is_on_its_way(rank, state.counts[stall.what][rank]) for rank in stall.peers
        )

    def _is_on_its_way(self, peer: int, count: int) -> bool:
        heartbeat = self._heartbeat(peer)
        return heartbeat.is_busy and heartbeat.num_completed - count < PEER_ENTRIES

    def _heartbeat(self, rank: int) -> Heartbeat:
        return self._ranks.setdefault(rank, _RankState()).heartbeat


def _describe(rank: int, stalls: Sequence[Stall]) -> str:
    texts = ", ".join(f"{stall.what} for {stall.age_s:.0f} s" for stall in stalls)
    return f"rank {rank} has made no progress with {texts}"
