"""What a replica holds at this moment, in numbers."""

from __future__ import annotations

from serve.protocol.messages import ReplicaLoad
from serve.replica.block_pool import BlockPool
from serve.replica.incoming import IncomingTransfers
from serve.replica.outgoing import OutgoingTransfers
from serve.replica.scheduler import Scheduler


def measure_load(
    pool: BlockPool,
    scheduler: Scheduler,
    incoming: IncomingTransfers,
    outgoing: OutgoingTransfers,
) -> ReplicaLoad:
    """The load of the replica that these belong to."""
    return ReplicaLoad(
        num_blocks=pool.num_blocks,
        num_free_blocks=pool.num_free,
        num_waiting=len(scheduler.waiting) + len(scheduler.arrived),
        num_running=len(scheduler.running),
        num_receiving=incoming.num_offered + incoming.num_reserved,
        num_sending=outgoing.num_sending,
        num_unfinished_tokens=scheduler.num_unfinished_tokens,
        num_preemptions=scheduler.num_preemptions,
    )
