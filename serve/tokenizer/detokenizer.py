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
        "_at_start", "_first_chars", "_held", "_num_tokens", "_partial", "_pieces", "_sampling",
        "_tokenizer",
    )  # fmt: skip

    def __init__(
        self, tokenizer: Tokenizer | None, sampling: SamplingParams, prompt_ids: Sequence[int]
    ) -> None:
        self._tokenizer = tokenizer
        self._sampling = sampling
        skip = sampling.skip_special_tokens
        self._pieces: tuple[bytes, ...] = tokenizer.pieces(skip) if tokenizer else ()
        self._first_chars = frozenset(stop[0] for stop in sampling.stop)
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
        at the same place, the one listed first counts. The first ``min_tokens`` tokens are not
        searched for stop strings.
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
        if not self._first_chars or self._num_tokens <= self._sampling.min_tokens:
            return TextPiece(text)
        return self._split_at_stop(self._held + text)

    def finish(self) -> str:
        """Return the text held back, to be shown when the output ends without a stop string."""
        text = self._held + self._partial.decode("utf-8", "replace")
        self._held, self._partial = "", b""
        return text

    def _piece(self, token_id: int) -> bytes:
        return self._pieces[token_id] if 0 <= token_id < len(self._pieces) else UNKNOWN

    def _split_at_stop(self, text: str) -> TextPiece:
        """Return ``text`` up to the first stop string, or up to where one may begin.

        Holds back the rest if there is no complete stop string.
        """
        found: str | None = None
        start = len(text)
        for stop in self._sampling.stop:
            index = text.find(stop)
            if 0 <= index < start:
                found, start = stop, index
        if found is not None:
            self._held, self._partial = "", b""
            shown = start + len(found) if self._sampling.include_stop_str_in_output else start
            return TextPiece(text[:shown], found)
        start = self._possible_stop(text)
        self._held = text[start:]
        return TextPiece(text[:start])

    def _possible_stop(self, text: str) -> int:
        """Return the first index where ``text`` ends with the beginning of a stop string.

        Returns the length of ``text`` if there is none.
        """
        stops = self._sampling.stop
        longest = max(map(len, stops))
        for index in range(max(0, len(text) - longest + 1), len(text)):
            if text[index] in self._first_chars and any(s.startswith(text[index:]) for s in stops):
                return index
        return len(text)
