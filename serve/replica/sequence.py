"""One request as its replica sees it: tokens, blocks, progress."""

from __future__ import annotations

from dataclasses import dataclass, field

from serve.request import Request, Timeline

OUT_OF_WINDOW_BLOCK = (
    0  # stands in a block table for one that was let go: named, never read or written
)


@dataclass(eq=False, slots=True)
class Sequence:
    """A request on a replica. Whoever keeps the sequence owns its ``owned_blocks``.

    ``number`` is its age on the replica: smaller is older. ``token_ids`` is prompt and output, as
    far as it is known here; ``num_pending`` more tokens (0 or 1) are sampled by a step whose result
    has not come. The KV of the first ``num_computed`` tokens is in the blocks, that of the first
    ``num_scheduled`` will be when the steps under way have run.

    ``block_table[i]`` holds positions ``[i * block_size, (i + 1) * block_size)``. Its first
    ``num_out_of_window_blocks`` entries are ``OUT_OF_WINDOW_BLOCK``: every attention window has
    passed them, and another sequence may own the blocks that stood there.
    """

    request: Request
    number: int
    decodes_here: bool
    token_ids: list[int]
    num_computed: int = 0
    num_scheduled: int = 0
    num_pending: int = 0
    row: int = 0  # of the last step that sampled it
    num_preemptions: int = 0
    block_table: list[int] = field(default_factory=list)
    num_out_of_window_blocks: int = 0
    timeline: Timeline = field(default_factory=Timeline)

    @property
    def id(self) -> str:
        """The request's id."""
        return self.request.id

    @property
    def num_prompt_tokens(self) -> int:
        """Length of the prompt."""
        return len(self.request.prompt_ids)

    @property
    def num_tokens(self) -> int:
        """Length with the token that is being sampled."""
        return len(self.token_ids) + self.num_pending

    @property
    def num_output_tokens(self) -> int:
        """Known tokens generated so far, on any replica."""
        return len(self.token_ids) - len(self.request.prompt_ids)

    @property
    def next_output_index(self) -> int:
        """The output index of the next token to be sampled."""
        return self.num_output_tokens + self.num_pending

    @property
    def output_ids(self) -> tuple[int, ...]:
        """The known tokens generated so far."""
        return tuple(self.token_ids[self.num_prompt_tokens :])

    @property
    def num_remaining(self) -> int:
        """Tokens to be scheduled before the next token can be sampled."""
        return self.num_tokens - self.num_scheduled

    @property
    def owned_blocks(self) -> list[int]:
        """The blocks of the table that are the sequence's own."""
        return self.block_table[self.num_out_of_window_blocks :]

    def drop_out_of_window_blocks(self, count: int) -> list[int]:
        """Let go of the first ``count`` blocks: those among them that were owned, now the caller's.

        ``ValueError`` if the table has fewer.
        """
        if count > len(self.block_table):
            raise ValueError(f"{count} blocks to be left of {len(self.block_table)}")
        left = self.block_table[self.num_out_of_window_blocks : count]
        self.block_table[self.num_out_of_window_blocks : count] = [OUT_OF_WINDOW_BLOCK] * len(left)
        self.num_out_of_window_blocks += len(left)
        return left

    def take_blocks(self) -> list[int]:
        """All that the sequence owns, now the caller's; its table is empty then."""
        blocks = self.owned_blocks
        self.block_table, self.num_out_of_window_blocks = [], 0
        return blocks

    @property
    def is_ending(self) -> bool:
        """Whether the token that is being sampled is the last one here, whatever it will be."""
        last = self.request.sampling.max_tokens if self.decodes_here else 1
        return self.num_pending > 0 and self.next_output_index >= last
