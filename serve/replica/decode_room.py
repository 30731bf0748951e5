"""DecodeRoom: whether the sequences that decode here are expected to fit until they end. Pure."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol

from serve.replica.block_pool import BlockPool
from serve.replica.growth import Growth, OutputLengths, peak_blocks
from serve.replica.limits import SchedulerLimits
from serve.request import Request


class Reserved(Protocol):
    """Blocks that are reserved for a request whose KV is on its way."""

    @property
    def request(self) -> Request: ...

    @property
    def number(self) -> int: ...

    @property
    def blocks(self) -> list[int]: ...


class DecodeRoom:
    """Compares the expected need of sequences with the blocks of the pool.

    With ``limits.overcommit`` above 1 it may be that much more. Then more sequences run at once,
    and some are preempted and computed again. That suits a batch of prompts that begin together,
    because their answers also grow together and the pool is half empty in the mean.
    """

    def __init__(self, pool: BlockPool, limits: SchedulerLimits) -> None:
        self._pool = pool
        self._block_size = limits.block_size
        self._max_held_tokens = limits.max_held_tokens
        self._overcommit = limits.overcommit
        self._lengths = OutputLengths()

    def on_ended(self, num_output_tokens: int) -> None:
        """Note the length of an answer that ended here, to expect others like it."""
        self._lengths.observe(num_output_tokens)

    def expect(self, request: Request, number: int, num_output_tokens: int = 0) -> Growth:
        """Return what a sequence with that many output tokens holds, and how it will go on."""
        length = self._lengths.expect(num_output_tokens, request.sampling.max_tokens, number)
        num_steps = max(0, length - num_output_tokens)
        num_tokens = request.num_prompt_tokens + num_output_tokens
        if self._max_held_tokens is None:
            return Growth(num_steps, num_tokens, num_steps)
        held = min(num_tokens, self._max_held_tokens)
        return Growth(num_steps, held, min(num_steps, self._max_held_tokens - held))

    def fits(self, growths: Iterable[Growth], num_owned: int) -> bool:
        """Return whether sequences that own ``num_owned`` blocks now find all that they need."""
        num_blocks = self._pool.num_free + num_owned
        return peak_blocks(growths, self._block_size) <= self._overcommit * num_blocks
