"""What a rank logs, and how its lines look."""

from __future__ import annotations

import logging
import sys

from serve.config.server import ServerConfig
from serve.topology import Place

log = logging.getLogger("serve")


def start_logging(config: ServerConfig, place: Place) -> None:
    """Log to stderr, every line with its rank; rank 0 says what was decided for the user."""
    logging.basicConfig(
        level=config.log_level.upper(),
        format=f"%(asctime)s %(levelname)s rank {place.rank} %(name)s: %(message)s",
        stream=sys.stderr,
    )
    if place.rank == 0:
        for note in config.notes:
            log.info("%s", note)
