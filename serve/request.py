"""Request, SamplingParams and Timeline: what crosses processes. Requests are immutable."""

from __future__ import annotations

import sys
from array import array
from collections.abc import Iterable
from enum import StrEnum

from msgspec import Struct

ID_BYTES = 4  # of a packed token id
MAX_TOKEN_RULES = 1024  # entries of logit_bias, and of stop_token_ids; for each a slot has memory


class FinishReason(StrEnum):
    """Why a request ended; the values are those of the OpenAI API."""

    STOP = "stop"
    LENGTH = "length"
    ABORT = "abort"
    ERROR = "error"


class SamplingParams(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """How the next token is chosen and when to stop.

    Every value is valid and final. The front end has checked the ranges, filled in the seed and
    clamped ``max_tokens`` to the context, so the other parts check nothing again.
    """

    max_tokens: int
    seed: int = 0
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0  # 0: off
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: dict[int, float] = {}
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    include_stop_str_in_output: bool = False
    skip_special_tokens: bool = True
    ignore_eos: bool = False
    min_tokens: int = 0

    @property
    def has_penalties(self) -> bool:
        """Whether the logits depend on which tokens were seen before."""
        return (
            self.presence_penalty != 0.0
            or self.frequency_penalty != 0.0
            or self.repetition_penalty != 1.0
        )


def pack_ids(ids: Iterable[int]) -> bytes:
    """Return token ids as int32, little-endian: the form in which requests carry a prompt."""
    packed = array("i", ids)
    if sys.byteorder == "big":
        packed.byteswap()
    return packed.tobytes()


def unpack_ids(packed: bytes) -> memoryview[int]:
    """Return a view of packed token ids: indexed, sliced and iterated like a tuple, not copied."""
    if sys.byteorder == "big":
        swapped = array("i", packed)
        swapped.byteswap()
        return memoryview(swapped)
    return memoryview(packed).cast("i")


class Request(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One prompt and how to continue it. An API call for ``n`` choices is ``n`` requests.

    ``prompt`` is packed by ``pack_ids``. A tuple takes up to 36 bytes for a token and a waiting
    prompt may be long, so choices of one prompt share one ``bytes`` object of 4 bytes for a token.
    """

    id: str
    prompt: bytes
    sampling: SamplingParams

    @property
    def prompt_ids(self) -> memoryview[int]:
        """The token ids of the prompt, as a view of ``prompt``."""
        return unpack_ids(self.prompt)

    @property
    def num_prompt_tokens(self) -> int:
        """Length of the prompt."""
        return len(self.prompt) // ID_BYTES


class Timeline(Struct, kw_only=True, omit_defaults=True):
    """When a request reached each stage, in seconds of one monotonic clock.

    None stands for a stage that it has not reached. A replica records times of its leader's clock;
    rank 0 converts them to its own clock when they arrive.
    """

    arrived_s: float | None = None
    prefill_queued_s: float | None = None
    prefill_started_s: float | None = None
    prefill_ended_s: float | None = None
    transfer_started_s: float | None = None
    transfer_ended_s: float | None = None
    decode_queued_s: float | None = None
    decode_started_s: float | None = None
    finished_s: float | None = None

    def merge(self, later: Timeline, offset_s: float) -> None:
        """Take over the times that ``later`` has, with ``offset_s`` added to reach this clock."""
        for name in later.__struct_fields__:
            value = getattr(later, name)
            if value is not None:
                setattr(self, name, value + offset_s)
