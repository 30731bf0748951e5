"""Queue orders: which waiting sequence of a replica is admitted first. Pure.

To add an order, enter a key function in ``QUEUE_ORDERS``. Its name there is its name on the command
line (``--schedule-policy``).
"""

from __future__ import annotations

from collections.abc import Callable

from serve.replica.sequence import Sequence

# The waiting sequence with the smallest key is admitted first; of equal ones, the one that was
# queued first. The queue is sorted only by inserting, so a key must not change while its sequence
# waits.
QueueOrder = Callable[[Sequence], tuple[float, ...]]


def fcfs(sequence: Sequence) -> tuple[float, ...]:
    """Preempted sequences first, the oldest of them first; then prompts as they arrived."""
    return (sequence.num_preemptions == 0, sequence.number)


QUEUE_ORDERS: dict[str, QueueOrder] = {"fcfs": fcfs}
