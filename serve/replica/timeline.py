"""Stamp the stages of requests into their timelines. Pure."""

from __future__ import annotations

from serve.replica.scheduler import Batch
from serve.replica.sequence import Sequence


def record_start(batch: Batch, now_s: float) -> None:
    """Stamp the start of the prefills and decodes whose first step is ``batch``.

    To be called when the step before has ended, because ``batch`` runs from then on.
    """
    for chunk in batch.chunks:
        timeline = chunk.sequence.timeline
        if timeline.prefill_queued_s is not None:
            timeline.prefill_started_s = timeline.prefill_started_s or now_s
        if timeline.decode_queued_s is not None:
            timeline.decode_started_s = timeline.decode_started_s or now_s


def record_first_token(sequence: Sequence, now_s: float) -> None:
    """Stamp the end of prefill and, if the sequence decodes here, the start of decode."""
    sequence.timeline.prefill_ended_s = now_s
    if sequence.decodes_here:
        sequence.timeline.decode_queued_s = sequence.timeline.decode_started_s = now_s
