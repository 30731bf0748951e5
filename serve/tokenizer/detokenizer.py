"""Detokenizer: turns the output tokens of one request into text, token by token.

``push`` returns the text that may be shown after each token. It holds back the bytes of an
incomplete UTF-8 character and text that may be the beginning of a stop string. This small state is
sent along in ``DetokenizerState`` when the request moves to another replica.
"""

from __future__ import annotations

from codecs import utf_8_decode
from collections.abc import Sequence
from typing import NamedTuple

from serve.protocol.messages import DetokenizerState
from serve.request import SamplingParams
from serve.tokenizer.stop_strings import StopStrings
from serve.tokenizer.tokenizer import UNKNOWN, Tokenizer


class TextPiece(NamedTuple):
    """``text`` may be shown now. ``stop`` is the stop string that ended the output, if any."""

    text: str
    stop: str | None = None


_NOTHING = TextPiece("")


class Detokenizer:
    """Detokenises one output. Without a tokenizer every text is empty.

    The joined texts of all pushes and of ``finish`` equal ``Tokenizer.decode`` of all ids, up to
    the stop string. There is one difference: the leading space of an output that follows prompt
    text is kept.
    """

    __slots__ = (
        "_at_start", "_held", "_num_tokens", "_partial", "_pieces", "_sampling", "_stops",
        "_tokenizer",
    )  # fmt: skip

    def __init__(
        self, tokenizer: Tokenizer | None, sampling: SamplingParams, prompt_ids: Sequence[int]
    ) -> None:
        self._tokenizer = tokenizer
        self._sampling = sampling
        skip = sampling.skip_special_tokens
        self._pieces: tuple[bytes, ...] = tokenizer.pieces(skip) if tokenizer else ()
        self._stops = StopStrings(sampling.stop) if sampling.stop else None
        # A prompt of special tokens only has no text, so the output begins the text.
        self._at_start = (
            tokenizer is not None
            and tokenizer.strips_leading_space
            and not any(self._piece(token_id) for token_id in prompt_ids)
        )
        self._partial = b""  # first bytes of an incomplete character
        self._held = ""  # possible beginning of a stop string
        self._num_tokens = 0

    @classmethod
    def resume(
        cls, tokenizer: Tokenizer | None, sampling: SamplingParams, state: DetokenizerState
    ) -> Detokenizer:
        """Continue an output from the ``state`` that a detokenizer returned, on any replica."""
        detokenizer = cls(tokenizer, sampling, ())
        detokenizer._at_start = state.at_start
        detokenizer._partial = state.partial
        detokenizer._held = state.held_text
        if detokenizer._stops is not None:
            detokenizer._stops.read(state.held_text)
        detokenizer._num_tokens = state.num_tokens
        return detokenizer

    def state(self) -> DetokenizerState:
        """Return what ``resume`` needs: a few bytes and at most the length of a stop string."""
        return DetokenizerState(
            partial=self._partial,
            held_text=self._held,
            at_start=self._at_start,
            num_tokens=self._num_tokens,
        )

    def push(self, token_id: int) -> TextPiece:
        """Add one token and return the text that may be shown. A ``stop`` ends the output.

        If the text contains several stop strings, the one that begins first counts. If those begin
        at the same place, the one listed first counts. A stop string that ends within the first
        ``min_tokens`` tokens does not count.
        """
        if self._tokenizer is None:
            return _NOTHING
        self._num_tokens += 1
        piece = self._piece(token_id)
        if self._at_start and piece:
            piece = self._tokenizer.strip_first(piece)
            self._at_start = False
        data = self._partial + piece
        text, num_used = utf_8_decode(data, "replace", False)
        self._partial = data[num_used:]
        return TextPiece(text) if self._stops is None else self._split_at_stop(self._stops, text)

    def finish(self) -> str:
        """Return the text held back, to be shown when the output ends without a stop string."""
        text = self._held + self._partial.decode("utf-8", "replace")
        self._held, self._partial = "", b""
        return text

    def _piece(self, token_id: int) -> bytes:
        return self._pieces[token_id] if 0 <= token_id < len(self._pieces) else UNKNOWN

    def _split_at_stop(self, stops: StopStrings, text: str) -> TextPiece:
        """Return the text up to the first stop string, or up to where one may begin.

        Holds back the rest if there is no complete stop string.
        """
        match = stops.read(text)
        whole = self._held + text
        if match is not None and self._num_tokens > self._sampling.min_tokens:
            shown = len(self._held) + match.start
            if self._sampling.include_stop_str_in_output:
                shown += len(match.stop)
            self._held, self._partial = "", b""
            return TextPiece(whole[:shown], match.stop)
        shown = len(whole) - stops.num_held
        self._held = whole[shown:]
        return TextPiece(whole[:shown])
