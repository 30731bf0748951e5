"""The protocol: every message that crosses the control channel, and who sends which to whom.

A request, from its prompt to its last token (time runs down)::

    rank 0                prefill leader                decode leader
      | Prefill ------------> |                              |
      |                       | Offer ---------------------> |  all blocks of the prompt admitted
      |                       | <--------------------- Ready |  blocks reserved: a loan begins
      | <------ Report(delta) |                              |  token 0
      |                       | Push ----------------------> |  KV follows on the ranks' own links
      |                       | <-------------- PushReceived |  a staging slot is free again
      |                       | Push(handover) ------------> |  the last one: the loan ends
      | <------------------------------------ Report(deltas) |  one per step
      | Abort --------------> | and -----------------------> |  at any time, to both
      |                       | Withdraw ------------------> |  instead of a last Push

The loan ends with exactly one of ``Push(handover)`` and ``Withdraw``. An announced Push is always
carried out on both sides. A message about an id that is unknown or closed is ignored.

Within a replica the leader sends its followers one ordered stream of plan entries,
``Step | PostReceive | Send | Unpack | Stop``; every rank issues exactly this sequence.
Ranks and rank 0 also exchange start-up, heartbeat and shutdown messages.
"""

from __future__ import annotations

from collections.abc import Sequence

import msgspec
from msgspec import Struct

from serve.request import FinishReason, Request, Timeline


class Message(Struct, frozen=True, tag=True, array_like=True, omit_defaults=True):
    """Base of everything that crosses the control channel."""


# --- rank 0 -> replicas -----------------------------------------------------------------------


class Prefill(Message, frozen=True):
    """Prefill this request, then hand it to ``decode_replica`` (its own id: keep it)."""

    request: Request
    decode_replica: int


class Abort(Message, frozen=True):
    """Forget this request, wherever it is."""

    request_id: str


# --- prefill leader <-> decode leader -----------------------------------------------------------


class DetokenizerState(Struct, frozen=True, array_like=True):
    """State of ``serve.tokenizer.detokenizer`` from which another replica goes on."""

    partial: bytes = b""  # of a character whose other bytes are still to come
    held_text: str = ""  # may be the beginning of a stop string
    at_start: bool = False
    num_tokens: int = 0


class Handover(Struct, frozen=True, array_like=True):
    """All that decode needs beside the KV: the tokens so far and the detokeniser's tail."""

    output_ids: tuple[int, ...]
    text: DetokenizerState


class Offer(Message, frozen=True):
    """The prompt of ``request`` is admitted at ``prefill_replica``: reserve blocks for it."""

    prefill_replica: int
    request: Request


class Ready(Message, frozen=True):
    """The blocks are reserved; until the loan ends they are the prefill replica's to fill."""

    request_id: str


class Push(Message, frozen=True):
    """The KV of blocks ``[first_block, first_block + num_blocks)`` of the prompt is being sent.

    ``number`` counts the pushes from one replica to another; ``number % NUM_STAGING_SLOTS`` is the
    staging slot on both sides. ``handover`` is set in the last push of a request.
    """

    prefill_replica: int
    number: int
    request_id: str
    first_block: int
    num_blocks: int
    handover: Handover | None = None


class PushReceived(Message, frozen=True):
    """Push ``number`` is in the decode replica's staging slots, and its unpacking is planned: what
    is received into them next will not overtake it.
    """

    decode_replica: int
    number: int


class Withdraw(Message, frozen=True):
    """The loan ends without a last push; ``num_pushes`` were announced for the request."""

    request_id: str
    num_pushes: int


NUM_STAGING_SLOTS = 4  # pushes from one replica to another that go out unacknowledged

# --- replicas -> rank 0 -------------------------------------------------------------------------


class Delta(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """New tokens of one request. ``first_index`` is the output index of the first of them.

    ``text`` is what may be shown now: text that could still become a stop string is held back.
    """

    request_id: str
    first_index: int
    token_ids: tuple[int, ...]
    text: str
    finish_reason: FinishReason | None = None
    stop_reason: str | int | None = None
    timeline: Timeline | None = None


class ReplicaLoad(Struct, frozen=True, kw_only=True):
    """What a replica holds at this moment."""

    num_blocks: int = 0
    num_free_blocks: int = 0
    num_waiting: int = 0
    num_running: int = 0
    num_receiving: int = 0
    num_sending: int = 0
    num_unfinished_tokens: int = 0
    num_preemptions: int = 0


class Report(Message, frozen=True):
    """What one step of a replica brought; without deltas it is the replica's heartbeat."""

    replica_id: int
    load: ReplicaLoad
    deltas: tuple[Delta, ...] = ()
    num_step_tokens: int = 0


# --- leader -> followers: the plan --------------------------------------------------------------


class StepSequence(Struct, frozen=True, array_like=True):
    """Tokens ``token_ids`` of one sequence, the first at position ``start``.

    ``block_table`` covers positions ``[0, start + len(token_ids))``; 0 stands for blocks that every
    window has passed. ``sample`` asks for the token that follows the last one. A token that the
    step before samples is not known yet: it is given as ``sampled_by(row)`` of that step.
    """

    start: int
    token_ids: tuple[int, ...]
    block_table: tuple[int, ...]
    sample: bool


def sampled_by(row: int) -> int:
    """What stands in ``token_ids`` for the token that row ``row`` of the step before samples."""
    return -1 - row


class SampleRow(Struct, frozen=True, array_like=True):
    """How to sample one row. Stays on the leader: followers compute logits, the leader samples.

    ``banned_ids`` may not be chosen (end tokens before ``min_tokens``). ``token_ids`` is at least
    the prompt and the first ``output_index - 1`` output tokens; the one after these is the row's
    input and may be unknown yet. It is the sequence's own list, which grows meanwhile.
    """

    request: Request
    output_index: int
    banned_ids: tuple[int, ...] = ()
    token_ids: Sequence[int] = ()


class Step(Message, frozen=True):
    """One forward pass over ``sequences``; ``rows`` has one entry per sequence with ``sample``."""

    sequences: tuple[StepSequence, ...]
    rows: tuple[SampleRow, ...] = ()


class PostReceive(Message, frozen=True):
    """Receive push ``number`` of ``prefill_replica`` into its staging slot."""

    prefill_replica: int
    number: int
    num_blocks: int


class Unpack(Message, frozen=True):
    """Copy the received push out of staging into ``block_ids``; empty: drop it."""

    prefill_replica: int
    number: int
    block_ids: tuple[int, ...]


class Send(Message, frozen=True):
    """Pack ``block_ids`` into the staging slot of push ``number`` and send it."""

    decode_replica: int
    number: int
    block_ids: tuple[int, ...]


class Stop(Message, frozen=True):
    """The last entry of a plan."""


Entry = Step | PostReceive | Unpack | Send | Stop


class Received(Message, frozen=True):
    """A follower has push ``number`` of ``prefill_replica`` in its staging slot."""

    prefill_replica: int
    number: int


# --- start-up, liveness, shutdown ---------------------------------------------------------------


class Ping(Message, frozen=True):
    """Rank 0 asks for the receiver's clock."""

    number: int


class Pong(Message, frozen=True):
    """The answer: ``clock_s`` is ``time.monotonic()`` at the sender."""

    rank: int
    number: int
    clock_s: float


class ReplicaReady(Message, frozen=True):
    """A leader to rank 0: model loaded, memory sized, links warmed."""

    replica_id: int
    num_blocks: int


class Heartbeat(Message, frozen=True):
    """A follower to rank 0, once a second."""


class Goodbye(Message, frozen=True):
    """The sender stops in order; it will not send again. ``rank`` is the sender's."""

    rank: int


class Failed(Message, frozen=True):
    """The sender cannot go on; the receiver is to stop with it. Names the reason."""

    rank: int
    reason: str


AnyMessage = (
    Prefill | Abort | Offer | Ready | Push | PushReceived | Withdraw | Report | Received | Entry
    | Ping | Pong | ReplicaReady | Heartbeat | Goodbye | Failed
)  # fmt: skip

_encoder = msgspec.msgpack.Encoder()
_decoder: msgspec.msgpack.Decoder[AnyMessage] = msgspec.msgpack.Decoder(AnyMessage)


def encode(message: AnyMessage) -> bytes:
    """One message as bytes (msgpack, tagged by type)."""
    return _encoder.encode(message)


def decode(data: bytes | memoryview) -> AnyMessage:
    """The message in ``data``; ``msgspec.ValidationError`` if it is none of ours."""
    return _decoder.decode(data)
