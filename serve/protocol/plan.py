"""The plan: the entries that a replica's leader sends its followers, in one ordered stream.

Every rank of the replica issues exactly this sequence. ``serve.protocol.messages`` has the life of
a request that leads to it.
"""

from __future__ import annotations

from collections.abc import Sequence

from msgspec import Struct

from serve.protocol.message import Message
from serve.request import Request


class StepSequence(Struct, frozen=True, array_like=True):
    """One sequence's part of a step: its ``token_ids``, the first at position ``start``.

    ``block_table`` covers positions ``[0, start + len(token_ids))``. It has 0 for blocks that lie
    before every layer's attention window. With ``sample`` the token after the last one is sampled.
    A token that the previous step samples is not known when this step is planned, so
    ``sampled_by(row)`` stands for it.
    """

    start: int
    token_ids: tuple[int, ...]
    block_table: tuple[int, ...]
    sample: bool


def sampled_by(row: int) -> int:
    """Return the placeholder in ``token_ids`` for the token of the previous step's row ``row``."""
    return -1 - row


class SampleRow(Struct, frozen=True, array_like=True):
    """How to sample one row. Only the leader samples, so this is not sent to followers.

    ``end_token_ids`` are the model's; like the stop tokens of the request, they must not be chosen
    before ``min_tokens``. ``token_ids`` has at least the prompt and the first ``output_index - 1``
    output tokens; the next one is the row's input, which the host may not know yet. It is the
    sequence's own, so it may grow during the step; a slice of it does not.
    """

    request: Request
    output_index: int
    end_token_ids: tuple[int, ...] = ()
    token_ids: Sequence[int] = ()


class Step(Message, frozen=True):
    """One forward pass over ``sequences``. ``rows`` has one entry per sequence with ``sample``."""

    sequences: tuple[StepSequence, ...]
    rows: tuple[SampleRow, ...] = ()


class PostReceive(Message, frozen=True):
    """Post the receive of push ``number`` of ``prefill_replica`` into its staging slot."""

    prefill_replica: int
    number: int
    num_blocks: int


class Unpack(Message, frozen=True):
    """Copy a received push from staging into ``block_ids``; drop it if they are empty."""

    prefill_replica: int
    number: int
    block_ids: tuple[int, ...]


class Send(Message, frozen=True):
    """Pack ``block_ids`` into the staging slot of push ``number`` and send it."""

    decode_replica: int
    number: int
    block_ids: tuple[int, ...]


class Stop(Message, frozen=True):
    """End the plan: the GPU thread of each rank ends."""


Entry = Step | PostReceive | Unpack | Send | Stop
