"""Sequence: one request on a replica, with its tokens, blocks and progress."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum

from serve.replica.token_ids import TokenIds
from serve.request import Request, Timeline

# Placeholder in a block table for a block that is out of the window. It is never read or written.
OUT_OF_WINDOW_BLOCK = 0


class Queue(Enum):
    """The queues of a scheduler."""

    WAITING = "waiting"
    RECEIVED = "received"
    RUNNING = "running"


@dataclass(eq=False, slots=True)
class Sequence:
    """A request on a replica. The holder of the sequence owns its ``owned_blocks``.

    ``number`` is the age on the replica: a smaller number is older. ``token_ids`` holds the prompt
    and the output tokens that are known here. ``num_pending`` further tokens (0 or 1) are sampled
    by a step whose result has not arrived. The KV of the first ``num_computed`` tokens is in the
    blocks. When all steps in flight have run, the KV of the first ``num_scheduled`` tokens is.

    ``block_table[i]`` holds positions ``[i * block_size, (i + 1) * block_size)``. Its first
    ``num_out_of_window_blocks`` entries are ``OUT_OF_WINDOW_BLOCK``: no later token reads those
    positions, and other sequences may own the blocks that held them.
    """

    request: Request
    number: int
    decodes_here: bool
    token_ids: TokenIds
    num_computed: int = 0
    num_scheduled: int = 0
    num_pending: int = 0
    row: int = 0  # in the sampled rows of the last step that sampled for this sequence
    num_preemptions: int = 0
    block_table: list[int] = field(default_factory=list)
    num_out_of_window_blocks: int = 0
    queue: Queue | None = None  # set by the scheduler that has the sequence
    timeline: Timeline = field(default_factory=Timeline)
    num_prompt_tokens: int = field(init=False)

    def __post_init__(self) -> None:
        self.num_prompt_tokens = self.request.num_prompt_tokens

    @property
    def id(self) -> str:
        """The request's id."""
        return self.request.id

    @property
    def num_tokens(self) -> int:
        """Length, including a token that is being sampled."""
        return self.num_prompt_tokens + len(self.token_ids.output) + self.num_pending

    @property
    def num_output_tokens(self) -> int:
        """Known output tokens, sampled on any replica."""
        return len(self.token_ids.output)

    @property
    def next_output_index(self) -> int:
        """Output index of the next token to be sampled."""
        return self.num_output_tokens + self.num_pending

    @property
    def output_ids(self) -> tuple[int, ...]:
        """The known output tokens."""
        return tuple(self.token_ids.output)

    @property
    def num_remaining(self) -> int:
        """Tokens to schedule before the next token can be sampled."""
        return self.num_tokens - self.num_scheduled

    @property
    def owned_blocks(self) -> list[int]:
        """The blocks of the table that the sequence owns."""
        return self.block_table[self.num_out_of_window_blocks :]

    def drop_out_of_window_blocks(self, count: int) -> list[int]:
        """Replace the first ``count`` blocks with placeholders.

        Returns those that the sequence owned; the caller owns them now. Raises ``ValueError`` if
        the table has fewer.
        """
        if count > len(self.block_table):
            raise ValueError(f"cannot drop {count} of {len(self.block_table)} blocks")
        dropped = self.block_table[self.num_out_of_window_blocks : count]
        placeholders = [OUT_OF_WINDOW_BLOCK] * len(dropped)
        self.block_table[self.num_out_of_window_blocks : count] = placeholders
        self.num_out_of_window_blocks += len(dropped)
        return dropped

    @property
    def num_owned_blocks(self) -> int:
        """How many blocks the sequence owns."""
        return len(self.block_table) - self.num_out_of_window_blocks

    def take_blocks(self) -> list[int]:
        """Return the owned blocks, which the caller owns then, and empty the table."""
        blocks = self.owned_blocks
        self.block_table, self.num_out_of_window_blocks = [], 0
        return blocks

    @property
    def is_ending(self) -> bool:
        """Whether the token that is being sampled is the last one here, whatever its id."""
        last = self.request.sampling.max_tokens if self.decodes_here else 1
        return self.num_pending > 0 and self.next_output_index >= last
