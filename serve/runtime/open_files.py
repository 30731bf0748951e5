"""The limit on open files, of which every connection takes one."""

from __future__ import annotations

import logging
import resource
from dataclasses import replace

from serve.config.http import HttpLimits

log = logging.getLogger("serve")

_MOST = 1 << 20  # where the hard limit is infinite
_OTHER_FILES = 512  # for weights, devices and the connections between ranks


def raise_open_files_limit() -> int:
    """Raise the soft limit to the hard one, and return it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _MOST if hard == resource.RLIM_INFINITY else hard
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
        return wanted
    return wanted if soft == resource.RLIM_INFINITY else soft


def fit_connections(limits: HttpLimits, num_files: int) -> HttpLimits:
    """Return ``limits`` with at most as many connections as ``num_files`` open files allow."""
    most = max(1, num_files - _OTHER_FILES)
    if limits.max_connections <= most:
        return limits
    log.warning(
        "at most %d connections, not the %d of --max-connections, because the hard limit is %d "
        "open files",
        most,
        limits.max_connections,
        num_files,
    )
    return replace(limits, max_connections=most)
