"""Live: a sequence with what only its replica's leader needs."""

from __future__ import annotations

from dataclasses import dataclass

from serve.replica.sequence import Sequence
from serve.request import Timeline
from serve.tokenizer.detokenizer import OutputText


@dataclass(eq=False, slots=True)
class Live:
    """One request on its way through this replica."""

    sequence: Sequence
    text: OutputText
    decode_replica: int
    told: bool = False  # whether rank 0 has this replica's stamps

    def untold_stamps(self) -> Timeline | None:
        """The stamps of this replica, with its first token of the request only."""
        told, self.told = self.told, True
        return None if told else self.sequence.stamps
