"""The text of one request's output, token by token: UTF-8, the first space, stop strings.

``push`` gives what may be shown after each token. Held back are the bytes of an unfinished
character, and text that may be the beginning of a stop string. What is held is small and goes
along in ``DetokenizerState`` when the request moves to another replica.
"""

from __future__ import annotations

from codecs import utf_8_decode
from collections.abc import Sequence
from typing import NamedTuple

from serve.protocol.messages import DetokenizerState
from serve.request import SamplingParams
from serve.tokenizer.tokenizer import UNKNOWN, Tokenizer


class TextPiece(NamedTuple):
    """``text`` may be shown now; ``stop`` is the stop string that ended it, if one did."""

    text: str
    stop: str | None = None


_NOTHING = TextPiece("")


class Detokenizer:
    """Detokenises one output. Without a tokenizer every text is empty.

    The texts of all pushes and of ``finish`` joined are ``Tokenizer.decode`` of all ids, up to the
    stop string. Where prompt text precedes the output, its first space is kept.
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
        self._at_start = (
            tokenizer is not None
            and tokenizer.strips_leading_space
            and not any(self._piece(token_id) for token_id in prompt_ids)
        )
        self._partial = b""  # of a character whose other bytes are still to come
        self._held = ""  # may be the beginning of a stop string
        self._num_tokens = 0

    @classmethod
    def resume(
        cls, tokenizer: Tokenizer | None, sampling: SamplingParams, state: DetokenizerState
    ) -> Detokenizer:
        """Go on where ``state`` was taken, on this replica or another."""
        output = cls(tokenizer, sampling, ())
        output._at_start = state.at_start
        output._partial = state.partial
        output._held = state.held_text
        output._num_tokens = state.num_tokens
        return output

    def state(self) -> DetokenizerState:
        """All that ``resume`` needs; a few bytes and at most a stop string long."""
        return DetokenizerState(
            partial=self._partial,
            held_text=self._held,
            at_start=self._at_start,
            num_tokens=self._num_tokens,
        )

    def push(self, token_id: int) -> TextPiece:
        """Add one token. After a piece with ``stop`` the output is at its end.

        Of several stop strings in the text, the one that begins first ends it; of those that begin
        at the same place, the one listed first. Within the first ``min_tokens`` tokens none does.
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
        """What is still held: shown when the output ends without a stop string."""
        text = self._held + self._partial.decode("utf-8", "replace")
        self._held, self._partial = "", b""
        return text

    def _piece(self, token_id: int) -> bytes:
        return self._pieces[token_id] if 0 <= token_id < len(self._pieces) else UNKNOWN

    def _split_at_stop(self, text: str) -> TextPiece:
        """``text`` up to the first stop string or up to where one may begin; the rest is held."""
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
        """Where ``text`` first may turn into a stop string, none being complete; its end if not."""
        stops = self._sampling.stop
        longest = max(map(len, stops))
        for index in range(max(0, len(text) - longest + 1), len(text)):
            if text[index] in self._first_chars and any(s.startswith(text[index:]) for s in stops):
                return index
        return len(text)
