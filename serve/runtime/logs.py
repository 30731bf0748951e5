"""The log of a rank, on stderr."""

from __future__ import annotations

import logging
import sys

from serve.config.server import ServerConfig
from serve.topology import RankInfo

log = logging.getLogger("serve")


def start_logging(config: ServerConfig, rank_info: RankInfo) -> None:
    """Log to stderr, with the rank in every line.

    On rank 0 also log the notes of ``config`` on the choices that it made for the user, and its
    warnings.
    """
    logging.basicConfig(
        level=config.log_level.upper(),
        format=f"%(asctime)s %(levelname)s rank {rank_info.rank} %(name)s: %(message)s",
        stream=sys.stderr,
    )
    if rank_info.rank == 0:
        for note in config.notes:
            log.info("%s", note)
        for warning in config.warnings:
            log.warning("%s", warning)
