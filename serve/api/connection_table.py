"""ConnectionTable: how many connections are open, in total and from each address."""

from __future__ import annotations

import logging
import time
from collections import Counter

from serve.api.client_identity import bucket_of, is_trusted, parse_address
from serve.api.refusals import Refusal
from serve.config.http import HttpLimits

log = logging.getLogger(__name__)

_LINES_PER_S = 10
_RETRY = {"Retry-After": "1"}


class ConnectionTable:
    """Counts open connections and refuses those over the limits."""

    def __init__(self, limits: HttpLimits) -> None:
        self._limits = limits
        self.num_open = 0
        self._by_address: Counter[str] = Counter()
        self._logged = False  # one line for a row of refusals, which can be thousands
        self._second = 0  # in which ``_num_lines`` were logged
        self._num_lines = 0

    def enter(self, peer: str | None) -> Refusal | None:
        """Count a connection from ``peer``, or return why it is refused; it is then not counted."""
        limits = self._limits
        address = self._capped_address(peer)
        if self.num_open >= limits.max_connections:
            limit = limits.max_connections
            return self._refuse(
                peer, 503, f"all {limit} connections are in use (--max-connections)"
            )
        if address is not None:
            limit = limits.max_connections_per_address
            if self._by_address[address] >= limit:
                return self._refuse(
                    peer, 429, f"{limit} connections from one address are open "
                    "(--max-connections-per-address)"
                )  # fmt: skip
            self._by_address[address] += 1
        self.num_open += 1
        return None

    def may_log(self) -> bool:
        """Return whether a refused request may have a line in the log: a few each second may."""
        second = int(time.monotonic())
        if second != self._second:
            self._second, self._num_lines = second, 0
        self._num_lines += 1
        return self._num_lines <= _LINES_PER_S

    def leave(self, peer: str | None) -> None:
        """Forget a connection that ``enter`` has counted."""
        self.num_open -= 1
        self._logged = False
        if (address := self._capped_address(peer)) is not None:
            self._by_address[address] -= 1
            if not self._by_address[address]:
                del self._by_address[address]

    def _capped_address(self, peer: str | None) -> str | None:
        address = parse_address(peer)
        if address is None or is_trusted(address, self._limits.trusted_proxies):
            return None
        return bucket_of(address)

    def _refuse(self, peer: str | None, status: int, message: str) -> Refusal:
        if not self._logged:
            self._logged = True
            log.warning("refused a connection from %s: %s", peer, message)
        return Refusal(status, message, _RETRY)
