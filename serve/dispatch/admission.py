"""Admission: how many requests and prompt tokens wait on this job, and how many of each client.

A request waits from its dispatch to its first token. Requests beyond the limits are refused, so
that the queue, and with it the memory and the time to the first token, stay bounded.

One client may not fill the queue of all. What it may hold depends on what is free: at most
``alpha`` times the free part that is left (Choudhury and Hahne, "Dynamic queue length thresholds
for shared-memory packet switches", IEEE/ACM Transactions on Networking 6(2), 1998). So a client
that is alone holds up to ``alpha / (1 + alpha)`` of the queue. That is ``max_share``, and the rest
stays free for others. Of several greedy clients each gets the same, and some part is always free.

Two rules keep small queues useful. When nothing waits, a call may take the whole queue, because it
is refused otherwise for ever. A single request of a client of whom nothing waits needs no more
than a free place.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from serve.request import Request


class TooManyWaiting(Exception):
    """The queue has no room for the requests. The message names the option that limits it."""


@dataclass(frozen=True, slots=True)
class QueueLimits:
    """The size of the queue, and the share of it that a client may hold while it is alone."""

    max_requests: int
    max_tokens: int
    max_share: float = 1.0  # 1: one client may hold all


@dataclass(slots=True)
class _Held:
    """The counts of the waiting requests of one client, or of all clients."""

    num_requests: int = 0
    num_tokens: int = 0


@dataclass(slots=True)
class Admission:
    """The requests without a first token, counted. ``client`` is any text that names a client."""

    limits: QueueLimits
    _total: _Held = field(default_factory=_Held)
    _clients: dict[str, _Held] = field(default_factory=dict)  # only those with waiting requests

    @property
    def num_requests(self) -> int:
        """Requests that wait."""
        return self._total.num_requests

    @property
    def num_tokens(self) -> int:
        """Prompt tokens of the requests that wait."""
        return self._total.num_tokens

    def check(self, requests: Sequence[Request], client: str) -> None:
        """Raise ``TooManyWaiting`` unless all of ``requests`` may be added."""
        total, limits, count = self._total, self.limits, len(requests)
        if count == 1 and total.num_requests == 0:
            return  # also a prompt longer than max_tokens
        if total.num_requests + count > limits.max_requests:
            raise TooManyWaiting(
                f"{total.num_requests} requests wait for their first token; --max-waiting "
                f"allows {limits.max_requests}"
            )
        num_tokens = sum(request.num_prompt_tokens for request in requests)
        if total.num_tokens + num_tokens > limits.max_tokens:
            raise TooManyWaiting(
                f"prompts of {total.num_tokens} tokens wait for their first token and this call "
                f"has {num_tokens}; --max-waiting-tokens allows {limits.max_tokens}"
            )
        held = self._clients.get(client, _Held())
        if total.num_requests == 0 or (count == 1 and held.num_requests == 0):
            return
        after = held.num_requests + count, held.num_tokens + num_tokens
        free = (
            limits.max_requests - total.num_requests - count,
            limits.max_tokens - total.num_tokens - num_tokens,
        )
        if not all(map(self._is_fair, after, free)):
            raise TooManyWaiting(
                f"{held.num_requests} requests of this client wait for their first token; "
                f"--max-waiting-share {limits.max_share:g} keeps the rest of the queue for others"
            )

    def add(self, request: Request, client: str) -> None:
        """Count a request that begins to wait."""
        for held in (self._total, self._clients.setdefault(client, _Held())):
            held.num_requests += 1
            held.num_tokens += request.num_prompt_tokens

    def remove(self, request: Request, client: str) -> None:
        """Count a request that waits no longer."""
        own = self._clients[client]
        for held in (self._total, own):
            held.num_requests -= 1
            held.num_tokens -= request.num_prompt_tokens
        if own.num_requests == 0:
            del self._clients[client]

    def _is_fair(self, held: int, free: int) -> bool:
        share = self.limits.max_share
        return (1 - share) * held <= share * free  # held <= alpha * free; share may be 1
