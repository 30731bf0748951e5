"""One request as its replica sees it: tokens, blocks, progress."""

from __future__ import annotations

from dataclasses import dataclass, field

from serve.request import Request, Timeline


@dataclass(eq=False, slots=True)
class Sequence:
    """A request on a replica. Whoever keeps the sequence owns the blocks in its table.

    ``number`` is its age on the replica: smaller is older. ``token_ids`` is prompt and output;
    the KV of the first ``num_computed`` of them is in the blocks.
    """

    request: Request
    number: int
    decodes_here: bool
    token_ids: list[int]
    num_computed: int = 0
    block_table: list[int] = field(default_factory=list)
    stamps: Timeline = field(default_factory=Timeline)

    @property
    def id(self) -> str:
        """The request's id."""
        return self.request.id

    @property
    def num_prompt_tokens(self) -> int:
        """Length of the prompt."""
        return len(self.request.prompt_ids)

    @property
    def num_output_tokens(self) -> int:
        """Tokens generated so far, on any replica."""
        return len(self.token_ids) - len(self.request.prompt_ids)

    @property
    def output_ids(self) -> tuple[int, ...]:
        """The tokens generated so far."""
        return tuple(self.token_ids[self.num_prompt_tokens :])

    @property
    def num_remaining(self) -> int:
        """Tokens whose KV is still to be computed before the next token can be sampled."""
        return len(self.token_ids) - self.num_computed
