"""Standstill: conditions of a replica that should end soon, and for how long they have held. Pure.

The plan of a rank can be empty while a request is stuck: an acknowledgement is lost, or an event
that should have started something did not. These conditions show that. A replica looks at them with
each heartbeat. Requests that wait for room are not among them, because that may take any time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

from serve.protocol.messages import Stall
from serve.replica.incoming import IncomingTransfers
from serve.replica.outgoing import OutgoingTransfers
from serve.replica.scheduler import Scheduler


class Condition(NamedTuple):
    """What should end soon. It may wait for the work of the replica ``waits_for``."""

    what: str
    waits_for: int | None = None


def find_conditions(
    scheduler: Scheduler,
    incoming: IncomingTransfers,
    outgoing: OutgoingTransfers,
    *,
    is_idle: bool,
) -> Iterator[Condition]:
    """Yield what should end soon on a replica. ``is_idle``: no step is in flight.

    On every link that is the oldest push that is not acknowledged. On an idle replica an offer
    should be answered if its blocks fit, and prompts should run if nothing else holds blocks. The
    result of a step in flight would look at both again.
    """
    for decode_replica, number in outgoing.oldest_unacknowledged():
        text = f"push {number} to replica {decode_replica}, which is not acknowledged"
        yield Condition(text, decode_replica)
    if not is_idle:
        return
    offer = incoming.oldest_offer
    if offer is not None and scheduler.can_reserve(
        offer.request, incoming.num_blocks_for(offer), incoming.reservations
    ):
        yield Condition(f"the offer of request {offer.request.id}, whose blocks fit")
    holds_blocks = scheduler.running or scheduler.received or len(outgoing) or outgoing.num_sending
    if scheduler.waiting and not holds_blocks and not incoming.num_reserved:
        yield Condition("prompts that wait although nothing runs")


class Standstill:
    """Times each condition from the first look that finds it to the last."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._since_s: dict[Condition, float] = {}

    def look(self, conditions: Iterator[Condition], leader_of: tuple[int, ...]) -> list[Stall]:
        """Note the conditions that hold now. Return each with its age, and its peer's leader."""
        now_s = self._clock()
        self._since_s = {found: self._since_s.get(found, now_s) for found in conditions}
        return [
            Stall(
                found.what,
                now_s - since_s,
                () if found.waits_for is None else (leader_of[found.waits_for],),
            )
            for found, since_s in self._since_s.items()
        ]

    def restart_clocks(self) -> None:
        """Count no time before now, because this whole process did not run for a while."""
        self._since_s = dict.fromkeys(self._since_s, self._clock())
