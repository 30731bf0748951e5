"""When the stages of a request begin and end on its replica, as its timeline has them. Pure."""

from __future__ import annotations

from serve.replica.scheduler import Batch
from serve.replica.sequence import Sequence


def stamp_start(batch: Batch, now_s: float) -> None:
    """No step is before ``batch`` any more: it runs from now on."""
    for chunk in batch.chunks:
        stamps = chunk.sequence.stamps
        if stamps.prefill_queued_s is not None:
            stamps.prefill_started_s = stamps.prefill_started_s or now_s
        if stamps.decode_queued_s is not None:
            stamps.decode_started_s = stamps.decode_started_s or now_s


def stamp_first_token(sequence: Sequence, now_s: float) -> None:
    """The prompt is read; where the replica goes on with it, decode begins."""
    sequence.stamps.prefill_ended_s = now_s
    if sequence.decodes_here:
        sequence.stamps.decode_queued_s = sequence.stamps.decode_started_s = now_s
