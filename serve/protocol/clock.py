"""How far another rank's clock is from this one's, from pings."""

from __future__ import annotations

from collections.abc import Sequence


def best_offset(samples: Sequence[tuple[float, float, float]]) -> float:
    """What to add to the remote clock, in seconds, to get the local one.

    Each sample is one ping: ``(sent_s, remote_s, received_s)``, the first and last by the local
    clock. The fastest ping decides: the error is at most half of its round trip, whatever delayed
    the others. ``ValueError`` without samples.
    """
    if not samples:
        raise ValueError("no ping to measure a clock with")
    sent_s, remote_s, received_s = min(samples, key=lambda sample: sample[2] - sample[0])
    return (sent_s + received_s) / 2 - remote_s
