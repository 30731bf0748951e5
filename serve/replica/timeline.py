"""When the stages of a request begin and end on its replica, as its timeline has them. Pure."""

from __future__ import annotations

from serve.replica.scheduler import Batch
from serve.replica.sequence import Sequence


def record_start(batch: Batch, now_s: float) -> None:
    """No step is before ``batch`` any more: it runs from now on."""
    for chunk in batch.chunks:
        timeline = chunk.sequence.timeline
        if timeline.prefill_queued_s is not None:
            timeline.prefill_started_s = timeline.prefill_started_s or now_s
        if timeline.decode_queued_s is not None:
            timeline.decode_started_s = timeline.decode_started_s or now_s


def record_first_token(sequence: Sequence, now_s: float) -> None:
    """The prompt is read; where the replica goes on with it, decode begins."""
    sequence.timeline.prefill_ended_s = now_s
    if sequence.decodes_here:
        sequence.timeline.decode_queued_s = sequence.timeline.decode_started_s = now_s
