"""Queue orders: which waiting sequence of a replica is admitted first. Pure.

To add an order, enter a ``QueueOrder`` in ``QUEUE_ORDERS``. Its name there is its name on the
command line (``--schedule-policy``). It applies to prompts that wait to be admitted, and to
preempted sequences among them. Received sequences and offers keep their order of arrival.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from serve.replica.sequence import Sequence


class QueueOrder(NamedTuple):
    """An order of waiting sequences; ``summary`` completes the help text of --schedule-policy.

    The sequence with the smallest ``key`` is admitted first; of equal ones, the one that was queued
    first. The queue is sorted only by inserting, so a key must not change while its sequence waits.
    """

    summary: str
    key: Callable[[Sequence], tuple[float, ...]]


FCFS = QueueOrder(
    "preempted requests first, then prompts in the order of their arrival",
    lambda sequence: (sequence.num_preemptions == 0, sequence.number),
)

QUEUE_ORDERS: dict[str, QueueOrder] = {"fcfs": FCFS}
