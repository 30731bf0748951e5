"""The protocol: every message on the control channel, with its sender and its receiver.

A replica is a group of ranks with one copy of the model. Its lowest rank, the leader, decides for
the others, its followers. Rank 0 also runs the HTTP server and the dispatcher.

The life of a request, from prompt to last token (time runs down)::

    rank 0                prefill leader                decode leader
      | Prefill ------------> |                              |  one for all choices of a prompt
      |                       | Offer ---------------------> |  the prompt has its blocks here
      |                       | <--------------------- Ready |  and there: the reservation begins
      | <------ Report(delta) |                              |  token 0
      |                       | Push ----------------------> |  the KV follows between the GPUs
      |                       | <-------------- PushReceived |  the staging slot may be reused
      |                       | Push(handover) ------------> |  last push: the reservation ends
      | <------------------------------------ Report(deltas) |  one per step, to the last token
      | Abort --------------> | and -----------------------> |  at any time, to both replicas
      |                       | Withdraw ------------------> |  in place of the last Push

A reservation ends with exactly one of ``Push(handover)`` and ``Withdraw``. Once a Push is sent,
both sides carry out its transfer, also after an abort. Messages about a request id that is unknown
or finished are ignored.

Within a replica the leader sends its followers the plan (``serve.protocol.plan``).
"""

from __future__ import annotations

import hashlib

import msgspec
from msgspec import Struct
from msgspec.structs import replace

from serve.protocol.message import Message
from serve.protocol.plan import Entry
from serve.request import FinishReason, Request, SamplingParams, Timeline

# --- rank 0 -> replicas -----------------------------------------------------------------------


class Choice(Struct, frozen=True, array_like=True):
    """What one answer to a prompt has of its own."""

    request_id: str
    seed: int
    decode_replica: int


class Prefill(Message, frozen=True):
    """Prefill a prompt for each of ``choices``, then hand it over to the choice's decode replica.

    The receiver's own id stands for decoding there. The choice's seed replaces that of
    ``sampling``.
    """

    prompt: bytes  # see ``Request.prompt``
    sampling: SamplingParams
    choices: tuple[Choice, ...]

    @classmethod
    def of(cls, *placed: tuple[Request, int]) -> Prefill:
        """Return the message for requests, each with its decode replica.

        The requests differ in nothing but their id and seed.
        """
        first = placed[0][0]
        choices = (Choice(request.id, request.sampling.seed, to) for request, to in placed)
        return cls(first.prompt, first.sampling, tuple(choices))

    @property
    def requests(self) -> list[tuple[Request, int]]:
        """Each request with its decode replica. All of them share the bytes of the prompt."""
        return [
            (self._request(choice.request_id, choice.seed), choice.decode_replica)
            for choice in self.choices
        ]

    def _request(self, id: str, seed: int) -> Request:
        return Request(id=id, prompt=self.prompt, sampling=replace(self.sampling, seed=seed))


class Abort(Message, frozen=True):
    """Stop work on a request, in any state, and free its blocks."""

    request_id: str


# --- prefill leader <-> decode leader -----------------------------------------------------------


class DetokenizerState(Struct, frozen=True, array_like=True):
    """State of ``serve.tokenizer.detokenizer``, with which another replica continues."""

    partial: bytes = b""  # the first bytes of a character that is not complete yet
    held_text: str = ""  # not sent yet, because it may be the start of a stop string
    at_start: bool = False
    num_tokens: int = 0


class Handover(Struct, frozen=True, array_like=True):
    """The state that decode needs in addition to the KV: output tokens and detokeniser state."""

    output_ids: tuple[int, ...]
    text: DetokenizerState


class Offer(Message, frozen=True):
    """Ask for blocks for the prompt of ``request``, which ``prefill_replica`` has admitted."""

    prefill_replica: int
    request: Request


class Ready(Message, frozen=True):
    """Confirm that the blocks are reserved. Only pushes write to them until that ends."""

    request_id: str


class Push(Message, frozen=True):
    """Announce the KV of the prompt's blocks ``[first_block, first_block + num_blocks)``.

    ``number`` counts the pushes between two replicas in one direction. The push uses staging slot
    ``number % NUM_STAGING_SLOTS`` on both sides. Only the last push has a ``handover``.
    """

    prefill_replica: int
    number: int
    request_id: str
    first_block: int
    num_blocks: int
    handover: Handover | None = None


class PushReceived(Message, frozen=True):
    """Acknowledge push ``number``: its slot may be reused, because its ``Unpack`` is planned."""

    decode_replica: int
    number: int


class Withdraw(Message, frozen=True):
    """End the reservation without a last push. ``num_pushes`` pushes were announced for it."""

    request_id: str
    num_pushes: int


NUM_STAGING_SLOTS = 4  # most unacknowledged pushes between two replicas in one direction

# --- replicas -> rank 0 -------------------------------------------------------------------------


class Delta(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """New tokens of one request. ``first_index`` is the output index of the first of them.

    ``text`` is new text for the client, without a tail that may still become a stop string.
    """

    request_id: str
    first_index: int
    token_ids: tuple[int, ...]
    text: str
    finish_reason: FinishReason | None = None
    stop_reason: str | int | None = None
    timeline: Timeline | None = None
    error: str | None = None  # with FinishReason.ERROR


class ReplicaLoad(Struct, frozen=True, kw_only=True):
    """Blocks and requests of a replica at one moment."""

    num_blocks: int = 0
    num_free_blocks: int = 0
    num_waiting: int = 0
    num_running: int = 0
    num_receiving: int = 0
    num_sending: int = 0
    num_preemptions: int = 0


class Report(Message, frozen=True):
    """Report one step of a replica, whose deltas may be empty.

    Without ``num_step_tokens`` it reports a change of load or is the leader's heartbeat.
    """

    replica_id: int
    load: ReplicaLoad
    deltas: tuple[Delta, ...] = ()
    num_step_tokens: int = 0


# --- follower -> leader --------------------------------------------------------------------------


class Received(Message, frozen=True):
    """Tell the leader that push ``number`` is in a follower's staging slot."""

    prefill_replica: int
    number: int


# --- start-up, liveness, shutdown ---------------------------------------------------------------


class Ping(Message, frozen=True):
    """Ask a leader for its clock, from rank 0."""

    number: int


class Pong(Message, frozen=True):
    """Answer a ping. ``clock_s`` is ``time.monotonic()`` at the sender, ``rank``."""

    rank: int
    number: int
    clock_s: float


class ReplicaReady(Message, frozen=True):
    """Tell rank 0 that a replica is loaded, its KV cache sized and its transfers warmed up."""

    replica_id: int
    num_blocks: int


class Stall(Struct, frozen=True, array_like=True, omit_defaults=True):
    """Work in flight at the sender, named by ``what``, that has not moved for ``age_s`` seconds.

    It may be waiting for the ``peers`` (ranks). Loading a model (``is_start``) has another limit.
    """

    what: str
    age_s: float
    peers: tuple[int, ...] = ()
    is_start: bool = False


class Heartbeat(Message, frozen=True):
    """Show a peer once a second that the sender's event loop runs.

    Rank 0 also gets the number of plan entries that the sender has completed, whether some are in
    flight, and the work that has not moved for a second or longer.
    """

    num_completed: int = 0
    is_busy: bool = False
    stalls: tuple[Stall, ...] = ()


class StopRequest(Message, frozen=True):
    """Ask rank 0 to drain and stop, because the sender got a signal; ``at_once``: its second."""

    at_once: bool = False


class Goodbye(Message, frozen=True):
    """Announce that ``rank`` stops in order and sends nothing more."""

    rank: int


class Failed(Message, frozen=True):
    """Announce that ``rank`` has failed, for ``reason``. The receiver must stop as well."""

    rank: int
    reason: str


AnyMessage = (
    Prefill | Abort | Offer | Ready | Push | PushReceived | Withdraw | Report | Received | Entry
    | Ping | Pong | ReplicaReady | Heartbeat | StopRequest | Goodbye | Failed
)  # fmt: skip


def protocol_digest() -> str:
    """Return a digest of all messages, equal where two ranks have the same protocol."""
    schema = msgspec.json.schema(AnyMessage)
    return hashlib.sha256(msgspec.json.encode(schema, order="sorted")).hexdigest()[:12]


_encoder = msgspec.msgpack.Encoder()
_decoder: msgspec.msgpack.Decoder[AnyMessage] = msgspec.msgpack.Decoder(AnyMessage)


def encode(message: AnyMessage) -> bytes:
    """Encode one message as msgpack, tagged by type."""
    return _encoder.encode(message)


def decode(data: bytes | memoryview) -> AnyMessage:
    """Decode one message. Raises ``msgspec.DecodeError`` if ``data`` is not one."""
    return _decoder.decode(data)
