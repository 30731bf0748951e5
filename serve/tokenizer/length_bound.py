"""LengthBound: how many tokens a text has at least, found without tokenising all of it.

Two bounds, because a limit on tokens must be checked before work that grows with the text:

* A text has at least its bytes divided by the bytes of the longest piece. This holds only if no
  step before the model drops text and no token stands for text of any length. Only steps for which
  that can be shown are recognised. Bytes that the vocabulary lacks, and so drops, are not counted.
* Where the first bound decides nothing and the text is far longer than a text of that many tokens
  usually is, parts of it are tokenised until there are enough tokens. Parts end before a space
  that follows a visible character. No token of the vocabulary spans such a place, so a part has
  the same tokens as in the whole text, except at its ends.

If neither holds for a tokenizer, only the limit on the size of a body bounds the work.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from serve.tokenizer.byte_alphabet import byte_alphabet

if TYPE_CHECKING:
    import tokenizers

# A text of so many bytes a token is tokenised whole, since that costs little more than the limit.
_USUAL_BYTES_PER_TOKEN = 8
_PART_CHARACTERS = 16 << 10
_WHOLE_BYTES = 64 << 10  # a shorter text is tokenised whole
_TOKENS_OF_A_CUT = 16  # that a part may have more at its two ends than in the whole text

_CUT = re.compile(r"\S ")
# Canonical composition makes at most 1 byte of 4: U+212A (3 bytes) is K, and U+1FBE with two marks
# (7 bytes) is U+0390 (2 bytes).
_BYTES_BEFORE_NORMALIZER = {"NFC": 4}
_NOT_UTF8 = {0xC0, 0xC1, *range(0xF5, 0x100)}  # bytes that no text has
_KEEPS_TEXT = ("ByteLevel", "Metaspace", "Digits")


@dataclass(frozen=True, slots=True)
class LengthBound:
    """The bounds of one tokenizer. None: the bound does not hold for it."""

    longest_piece: int | None  # bytes of text in one token
    tokens_of_a_cut: int | None
    dropped: bytes = b""  # bytes without a token, of which text leaves no trace

    def least_tokens(self, text: str, enough: int, count: Callable[[str], int]) -> int:
        """Return how many tokens ``text`` has at least; not more exactly than ``enough`` asks for.

        ``count`` returns the number of tokens of a part, without special tokens.
        """
        data = text.encode()
        num_bytes = len(data)
        least = 0
        if self.longest_piece:
            kept = len(data.translate(None, self.dropped)) if self.dropped else num_bytes
            least = -(-kept // self.longest_piece)
        del data
        usual = max(_WHOLE_BYTES, _USUAL_BYTES_PER_TOKEN * enough)
        if least >= enough or num_bytes <= usual or self.tokens_of_a_cut is None:
            return least
        found = 0
        for part in _parts(text):
            found += max(0, self._count_part(part, count) - self.tokens_of_a_cut)
            if found >= enough:
                break
        return max(least, found)

    def _count_part(self, part: str, count: Callable[[str], int]) -> int:
        """Count, but not in a word without end, which a merging model reads more than once."""
        if len(part) > 4 * _PART_CHARACTERS and self.longest_piece:
            return len(part.encode().translate(None, self.dropped)) // self.longest_piece
        return count(part)


def _parts(text: str) -> Iterator[str]:
    start = 0
    while start < len(text):
        cut = _CUT.search(text, start + _PART_CHARACTERS)
        end = cut.start() + 1 if cut else len(text)
        yield text[start:end]
        start = end


def read_length_bound(backend: tokenizers.Tokenizer, pieces: Sequence[bytes]) -> LengthBound:
    """Return the bounds of a tokenizer whose token ``i`` stands for the bytes ``pieces[i]``."""
    added = backend.get_added_tokens_decoder()
    dropped = _dropped_bytes(backend)
    longest = None if dropped is None else _longest_piece(backend, pieces)
    if dropped and backend.normalizer is not None:  # it may make dropped bytes of others
        longest = None
    return LengthBound(longest, _tokens_of_a_cut(pieces, added), dropped or b"")


def _tokens_of_a_cut(pieces: Sequence[bytes], added: Mapping[int, Any]) -> int | None:
    """Return None if a token of the vocabulary itself may span the place of a cut."""
    spanning = [i for i, piece in enumerate(pieces) if re.search(rb"[^\s] ", piece)]
    if any(i not in added for i in spanning):
        return None
    return _TOKENS_OF_A_CUT + max((len(pieces[i]) for i in spanning), default=0)


def _longest_piece(backend: tokenizers.Tokenizer, pieces: Sequence[bytes]) -> int | None:
    """Return the most bytes of text that one token stands for, or None if that has no bound."""
    factor = _normalizer_factor(_state(backend.normalizer))
    # Tokens that swallow the spaces beside them stand for text of any length.
    swallows = any(t.lstrip or t.rstrip for t in backend.get_added_tokens_decoder().values())
    if factor is None or swallows or not _splitter_keeps_text(_state(backend.pre_tokenizer)):
        return None
    return factor * max(4, *map(len, pieces))  # 4: an unknown character


def _state(part: Any) -> dict[str, Any] | None:
    return json.loads(part.__getstate__()) if part is not None else None


def _normalizer_factor(state: dict[str, Any] | None) -> int | None:
    """Return the most bytes that one byte of normalised text stands for; None: any number."""
    match state:
        case None | {"type": "Prepend"}:
            return 1
        case {"type": "Replace", "pattern": {"String": str(old)}, "content": str(new)} if (
            0 < len(old.encode()) <= len(new.encode())
        ):
            return 1
        case {"type": "Sequence", "normalizers": list(parts)}:
            product = 1
            for part in parts:
                factor = _normalizer_factor(part)
                if factor is None:
                    return None
                product *= factor
            return product
        case {"type": name}:
            return _BYTES_BEFORE_NORMALIZER.get(name)
    return None


def _splitter_keeps_text(state: dict[str, Any] | None) -> bool:
    match state:
        case None:
            return True
        case {"type": "Split" | "Punctuation", "behavior": behavior}:
            return bool(behavior != "Removed")
        case {"type": "Sequence", "pretokenizers": list(parts)}:
            return all(_splitter_keeps_text(part) for part in parts)
    return bool(state["type"] in _KEEPS_TEXT)


def _dropped_bytes(backend: tokenizers.Tokenizer) -> bytes | None:
    """Return the bytes that have no token, or None if a token may stand for text of any length.

    That is so where unknown characters are joined into one token, or leave nothing.
    """
    model = backend.model
    if getattr(model, "byte_fallback", False) and _has_byte_tokens(backend):
        return b""
    if type(model).__name__ != "BPE":
        return None
    if model.unk_token is not None:
        return None if model.fuse_unk else b""
    if _is_byte_level(_state(backend.pre_tokenizer)):
        alphabet = byte_alphabet().items()
        missing = {byte for char, byte in alphabet if backend.token_to_id(char) is None}
        return bytes(sorted(missing - _NOT_UTF8))
    return None


def _is_byte_level(state: dict[str, Any] | None) -> bool:
    if state is None:
        return False
    parts = state.get("pretokenizers", [state])
    return any(part.get("type") == "ByteLevel" for part in parts)


def _has_byte_tokens(backend: tokenizers.Tokenizer) -> bool:
    return all(backend.token_to_id(f"<0x{byte:02X}>") is not None for byte in range(256))
