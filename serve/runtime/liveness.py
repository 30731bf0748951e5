"""Whether the other ranks still run: rank 0 ends the job when one of them stops sending.

Every rank sends a heartbeat or a report at least once a second. A process that is stopped or stuck
keeps its connections open, so only its silence shows that it does not run any more.
"""

from __future__ import annotations

import asyncio

from serve.comm.control import ControlChannel
from serve.runtime.failure import FirstFailure, JobFailed

SILENCE_LIMIT_S = 60.0
SILENCE_CHECK_S = 5.0


async def watch_silence(channel: ControlChannel, failure: FirstFailure) -> None:
    """Fail the job when a connected rank has sent nothing for ``SILENCE_LIMIT_S``."""
    while True:
        await asyncio.sleep(SILENCE_CHECK_S)
        if silent := channel.silent_peers(SILENCE_LIMIT_S):
            reason = f"rank {silent[0]} has been silent for {SILENCE_LIMIT_S:.0f} s"
            failure.fail(JobFailed(reason))
