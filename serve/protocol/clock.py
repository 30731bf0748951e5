"""The offset between the clocks of two ranks, estimated from pings."""

from __future__ import annotations

from collections.abc import Sequence


def best_offset(samples: Sequence[tuple[float, float, float]]) -> float:
    """Return the seconds to add to the remote clock to get the local one.

    Each sample is one ping: ``(sent_s, remote_s, received_s)``, the first and last by the local
    clock. The fastest ping is used, because the error is at most half of its round trip. Raises
    ``ValueError`` if there are no samples.
    """
    if not samples:
        raise ValueError("no ping to measure a clock with")
    sent_s, remote_s, received_s = min(samples, key=lambda sample: sample[2] - sample[0])
    return (sent_s + received_s) / 2 - remote_s
