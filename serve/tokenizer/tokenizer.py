"""Tokenizer: text to ids, ids to text, and the chat template.

Decoding does not use the `tokenizers` library. The bytes of every token are computed once, when the
tokenizer is loaded. Decoding is then a join and a UTF-8 decode, incremental output uses the same
bytes, and ids without a token are shown as U+FFFD instead of nothing. This works for byte-level BPE
and for sentencepiece vocabularies. A tokenizer with another decoder, such as WordPiece, is refused.

All methods may be called from several threads. The library raises "Already borrowed" if one thread
changes a tokenizer while another uses it. So truncation and padding are switched off at load, and
nothing changes the tokenizer after that.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from serve.tokenizer.byte_alphabet import byte_alphabet
from serve.tokenizer.files import load_fast
from serve.tokenizer.length_bound import read_length_bound

if TYPE_CHECKING:
    import tokenizers
    from transformers import PreTrainedTokenizerFast

log = logging.getLogger(__name__)

UNKNOWN = "\ufffd".encode()  # the bytes of an id without a token
_ALL_SPACES = -1


def load_tokenizer(path: str, model_path: str, chat_template: str | None) -> Tokenizer:
    """Load the tokenizer of a directory or a ``.gguf`` file on this machine.

    ``chat_template`` replaces the tokenizer's own. That is ``chat_template.jinja`` in the
    tokenizer's directory, or else the template in its configuration or metadata, or else
    ``chat_template.jinja`` in the directory ``model_path``. Raises ``ValueError`` with one line if
    there is no usable tokenizer, or if its chat template does not compile.
    """
    try:
        fast = load_fast(Path(path))
        template = chat_template or _own_template(fast, Path(path), Path(model_path))
        tokenizer = Tokenizer(fast, template)
    except Exception as error:  # a broken checkpoint makes transformers raise many types
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ValueError(f"cannot load the tokenizer of {path}: {reason}") from error
    tokenizer.check_chat_template()
    return tokenizer


class Tokenizer:
    """One vocabulary. Ids are in ``range(vocab_size)``; some of them may have no token."""

    def __init__(self, fast: PreTrainedTokenizerFast, chat_template: str | None) -> None:
        backend: tokenizers.Tokenizer = fast.backend_tokenizer
        backend.no_truncation()
        backend.no_padding()
        self._fast = fast
        self._backend = backend
        self._template = chat_template
        spelling = _read_decoder(backend.decoder)
        vocab = backend.get_vocab(with_added_tokens=True)
        pieces = [UNKNOWN] * (max(vocab.values(), default=-1) + 1)
        for token, token_id in vocab.items():
            pieces[token_id] = spelling.to_bytes(token)
        visible = list(pieces)
        for token_id, added in backend.get_added_tokens_decoder().items():
            if added.special:
                visible[token_id] = b""
        self._pieces = {False: tuple(pieces), True: tuple(visible)}
        self._bound = read_length_bound(backend, pieces)
        self._leading_spaces = spelling.leading_spaces
        self.vocab_size = len(pieces)
        self.eos_token_id: int | None = fast.eos_token_id

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Return the ids of ``text``. Raises ``ValueError`` if it contains a lone surrogate."""
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise ValueError(f"text has a lone surrogate at position {error.start}") from error
        # The call for a batch releases the GIL while it works; the call for one text does not.
        batch = self._backend.encode_batch_fast([text], add_special_tokens=add_special_tokens)
        ids: list[int] = batch[0].ids
        return ids

    def least_tokens(self, text: str, enough: int) -> int:
        """Return how many tokens ``text`` has at least, at a cost that ``enough`` bounds.

        The answer is exact enough to tell whether there are ``enough``, but 0 where no bound is
        known. Raises ``ValueError`` as ``encode`` does.
        """
        return self._bound.least_tokens(
            text, enough, lambda part: len(self.encode(part, add_special_tokens=False))
        )

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """Return the text of ``ids``. Invalid UTF-8 and ids without a token become U+FFFD."""
        pieces = self._pieces[skip_special_tokens]
        known = range(self.vocab_size)
        parts = [part for i in ids if (part := pieces[i] if i in known else UNKNOWN)]
        if parts:
            parts[0] = self.strip_first(parts[0])
        return b"".join(parts).decode("utf-8", "replace")

    def id_to_token(self, token_id: int) -> str:
        """Return the token as the vocabulary spells it, or U+FFFD if the id has none."""
        if not 0 <= token_id < self.vocab_size:
            return "\ufffd"
        return self._backend.id_to_token(token_id) or "\ufffd"

    def pieces(self, skip_special_tokens: bool) -> tuple[bytes, ...]:
        """Return the bytes of every id: none for special tokens if those are skipped."""
        return self._pieces[skip_special_tokens]

    @property
    def strips_leading_space(self) -> bool:
        """Whether the first token of a text loses its leading space (sentencepiece)."""
        return self._leading_spaces != 0

    def strip_first(self, piece: bytes) -> bytes:
        """Remove the space that encoding puts before a text from its first ``piece``."""
        if self._leading_spaces == _ALL_SPACES:
            return piece.lstrip(b" ")
        return piece.removeprefix(b" ") if self._leading_spaces else piece

    @property
    def has_chat_template(self) -> bool:
        """Whether ``render_chat`` can work."""
        return self._template is not None

    def render_chat(
        self, messages: list[dict[str, Any]], add_generation_prompt: bool = True, **kwargs: Any
    ) -> str:
        """Render ``messages`` with the chat template in jinja's sandbox and return the prompt.

        ``kwargs`` are variables of the template. Raises ``ValueError`` with the template's error
        text, or if there is no template.
        """
        if self._template is None:
            raise ValueError("the model has no chat template")
        try:
            text = self._fast.apply_chat_template(
                messages,
                chat_template=self._template,
                add_generation_prompt=add_generation_prompt,
                tokenize=False,
                **kwargs,
            )
        except Exception as error:  # a template is the checkpoint's code and may raise any type
            raise ValueError(str(error) or type(error).__name__) from error
        return str(text)

    def check_chat_template(self) -> None:
        """Raise ``ValueError`` if the chat template does not compile."""
        from jinja2 import TemplateSyntaxError

        if self._template is None:
            return
        try:
            self.render_chat([{"role": "user", "content": ""}])
        except ValueError as error:
            # Other errors are no fault: a valid template may refuse this trial message.
            cause = error.__cause__
            if isinstance(cause, TemplateSyntaxError):
                raise ValueError(f"chat template, line {cause.lineno}: {cause.message}") from cause


def _own_template(fast: PreTrainedTokenizerFast, path: Path, model_path: Path) -> str | None:
    named = fast.chat_template if isinstance(fast.chat_template, dict) else {}
    configured = named.get("default") if named else fast.chat_template
    template = _read_template(path) or configured or _read_template(model_path)
    if named and not template:
        log.warning(
            "chat is disabled: none of the chat templates %s is named default; "
            "give one with --chat-template",
            ", ".join(sorted(named)),
        )
    return template or None


def _read_template(directory: Path) -> str | None:
    file = directory / "chat_template.jinja"
    return file.read_text(encoding="utf-8") if file.is_file() else None


# --- the bytes of a token -----------------------------------------------------------------------


_ALPHABET = byte_alphabet()
_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")


@dataclass(frozen=True, slots=True)
class _Spelling:
    """How a vocabulary writes bytes as tokens."""

    byte_level: bool
    byte_fallback: bool
    replacements: tuple[tuple[str, str], ...]
    leading_spaces: int  # removed from the first token of a text: 0, 1 or _ALL_SPACES

    def to_bytes(self, token: str) -> bytes:
        """Return the bytes that ``token`` stands for."""
        if self.byte_level and all(c in _ALPHABET for c in token):
            return bytes([_ALPHABET[c] for c in token])
        if self.byte_fallback and (match := _BYTE_TOKEN.fullmatch(token)):
            return bytes.fromhex(match[1])
        for old, new in self.replacements:
            token = token.replace(old, new)
        return token.encode()


def _read_decoder(decoder: tokenizers.decoders.Decoder | None) -> _Spelling:
    """Return how a vocabulary with this decoder spells bytes. Raises ``ValueError`` if unknown."""
    if decoder is None:
        raise ValueError("the tokenizer has no decoder")
    state: dict[str, Any] = json.loads(decoder.__getstate__())
    parts = state.get("decoders", [state])
    if any(part.get("type") == "ByteLevel" for part in parts):
        # Every byte has a character of its own, so other steps of the decoder have no effect.
        return _Spelling(True, False, (), 0)
    byte_fallback = fused = False
    replacements: list[tuple[str, str]] = []
    leading_spaces = 0
    for part in parts:
        match part:
            case {"type": "ByteFallback"}:
                byte_fallback = True
            case {"type": "Fuse"}:
                fused = True
            case {"type": "Replace", "pattern": {"String": old}, "content": new} if not fused:
                replacements.append((old, new))
            case {"type": "Strip", "content": " ", "start": 1, "stop": 0} if fused:
                leading_spaces = 1
            case {"type": "Metaspace", "replacement": mark, "prepend_scheme": scheme}:
                replacements.append((mark, " "))
                leading_spaces = 0 if scheme == "never" else _ALL_SPACES
            case _:
                raise ValueError(f"decoder {part.get('type')} is not supported")
    return _Spelling(False, byte_fallback, tuple(replacements), leading_spaces)
