"""Output: the tokens of one request as the dispatcher passes them on, step by step."""

from __future__ import annotations

from msgspec import Struct

from serve.request import FinishReason, Timeline


class Output(Struct, frozen=True, kw_only=True):
    """New tokens of one request, in order. The last output has a ``finish_reason``."""

    request_id: str
    first_index: int  # output index of the first token
    token_ids: tuple[int, ...]
    text: str
    finish_reason: FinishReason | None = None
    stop_reason: str | int | None = None
    timeline: Timeline | None = None  # with finish_reason
    error: str | None = None  # with FinishReason.ERROR
