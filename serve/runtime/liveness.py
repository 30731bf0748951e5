"""Whether the peers of this rank still run: a rank ends the job when one of them stops sending.

Every rank sends each peer a heartbeat about once a second. A process that is stopped or stuck keeps
its connections open, so only its silence shows that it does not run any more. Rank 0 is a peer of
every rank, so it is watched as well.
"""

from __future__ import annotations

import asyncio
import time

from serve.comm.control import ControlChannel
from serve.runtime.failure import FirstFailure, JobFailed

CHECK_S = 5.0


async def watch_peers(channel: ControlChannel, failure: FirstFailure, limit_s: float) -> None:
    """Fail the job when a connected peer has sent nothing for ``limit_s``."""
    check_s = min(CHECK_S, limit_s / 4)
    while True:
        slept_s = time.monotonic()
        await asyncio.sleep(check_s)
        if time.monotonic() - slept_s > check_s + limit_s / 2:
            # This process was stopped itself, and what its peers sent meanwhile is still unread.
            channel.restart_clocks()
        elif silent := channel.silent_peers(limit_s):
            failure.fail(JobFailed(f"rank {silent[0]} has been silent for {limit_s:.0f} s"))
