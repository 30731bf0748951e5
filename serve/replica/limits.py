"""SchedulerLimits: what bounds a step and the sequences of one replica."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class SchedulerLimits:
    """The limits of a step, and the shape of the KV cache as far as scheduling needs it.

    ``window`` is the largest sliding window of the model's layers, in tokens: a token at position
    ``p`` reads positions ``> p - window``. It is None if some layer has no window.
    """

    max_num_seqs: int
    max_num_batched_tokens: int
    enable_chunked_prefill: bool
    block_size: int
    window: int | None = None
    overcommit: float = 1.0  # expected KV over the KV that there is, see DecodeRoom

    @property
    def num_ahead(self) -> int:
        """How many received sequences may wait for a place among those that run.

        While a sequence ends, its successor is there already, and few blocks wait.
        """
        return max(1, self.max_num_seqs // 8)

    @property
    def max_held_tokens(self) -> int | None:
        """Most tokens that one decoding sequence has blocks for, or None."""
        # The window and the tokens of two steps, in blocks of which the ends need not be filled.
        return None if self.window is None else max(self.window, 2) + 2 + 2 * self.block_size

    def num_out_of_window_blocks(self, position: int) -> int:
        """Count the leading blocks of a sequence that no token at ``position`` or later reads."""
        if self.window is None:
            return 0
        # Always keep the token before, so that a prompt has at least one block to send to decode.
        first_kept = position + 1 - max(self.window, 2)
        return max(first_kept, 0) // self.block_size
