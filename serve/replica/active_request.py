"""ActiveRequest: a sequence with the state that only its replica's leader needs."""

from __future__ import annotations

from dataclasses import dataclass

from serve.replica.sequence import Sequence
from serve.replica.stop_check import EndTokens
from serve.request import Timeline
from serve.tokenizer.detokenizer import Detokenizer


@dataclass(eq=False, slots=True)
class ActiveRequest:
    """One request that this replica prefills or decodes."""

    sequence: Sequence
    detokenizer: Detokenizer
    end_tokens: EndTokens
    decode_replica: int
    timeline_reported: bool = False  # whether rank 0 has this replica's timeline

    def unreported_timeline(self) -> Timeline | None:
        """Return the timeline at the first call, None after that: rank 0 needs it once."""
        reported, self.timeline_reported = self.timeline_reported, True
        return None if reported else self.sequence.timeline
