"""Live: a sequence with what only its replica's leader needs."""

from __future__ import annotations

from dataclasses import dataclass

from serve.replica.sequence import Sequence
from serve.request import Timeline
from serve.tokenizer.detokenizer import Detokenizer


@dataclass(eq=False, slots=True)
class ActiveRequest:
    """One request on its way through this replica."""

    sequence: Sequence
    detokenizer: Detokenizer
    decode_replica: int
    reported: bool = False  # whether rank 0 has this replica's timeline

    def unreported_timeline(self) -> Timeline | None:
        """The timeline of this replica, with its first token of the request only."""
        reported, self.reported = self.reported, True
        return None if reported else self.sequence.timeline
