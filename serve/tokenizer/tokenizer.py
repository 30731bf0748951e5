"""Text into ids and back, the chat template, and what bytes each token stands for.

Decoding does not ask the `tokenizers` library: every token is turned into its bytes once, at load.
Text is then a join and a UTF-8 decode, the same bytes serve incremental output, and ids that the
vocabulary lacks can be shown as U+FFFD instead of vanishing. Byte-level BPE and sentencepiece
vocabularies are spelled like that; a decoder that is not (WordPiece, say) is refused at load.

Everything here may be called from several threads. The library reports "Already borrowed" where one
thread changes a tokenizer that another one uses, so nothing changes it after load: truncation and
padding are switched off there, for good.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from serve.tokenizer.files import load_fast

if TYPE_CHECKING:
    import tokenizers
    from transformers import PreTrainedTokenizerFast

log = logging.getLogger(__name__)

UNKNOWN = "\ufffd".encode()  # what an id without a token reads as
_ALL_SPACES = -1


def load_tokenizer(path: str, model_path: str, chat_template: str | None) -> Tokenizer:
    """The tokenizer of a directory or a ``.gguf`` file on this machine.

    ``chat_template`` replaces the tokenizer's own: ``chat_template.jinja`` in its directory, else
    what its configuration or metadata has, else ``chat_template.jinja`` in the directory
    ``model_path``. ``ValueError``, in one line, if there is no usable one.
    """
    try:
        fast = load_fast(Path(path))
        template = chat_template or _own_template(fast, Path(path), Path(model_path))
        tokenizer = Tokenizer(fast, template)
    except Exception as error:  # whatever a broken checkpoint makes transformers raise
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ValueError(f"cannot load the tokenizer of {path}: {reason}") from error
    tokenizer.check_chat_template()
    return tokenizer


class Tokenizer:
    """One vocabulary. Ids are in ``range(vocab_size)``, where not every one need have a token."""

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
        self._leading_spaces = spelling.leading_spaces
        self.vocab_size = len(pieces)
        self.eos_token_id: int | None = fast.eos_token_id

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """The ids of ``text``. ``ValueError`` for text that is no Unicode (a lone surrogate).

        The batch call releases the GIL while it works, the single one does not.
        """
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise ValueError(f"text has a lone surrogate at position {error.start}") from error
        batch = self._backend.encode_batch_fast([text], add_special_tokens=add_special_tokens)
        ids: list[int] = batch[0].ids
        return ids

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """The text of ``ids``; bytes that are no UTF-8 and ids without a token read as U+FFFD."""
        pieces = self._pieces[skip_special_tokens]
        known = range(self.vocab_size)
        parts = [part for i in ids if (part := pieces[i] if i in known else UNKNOWN)]
        if parts:
            parts[0] = self.strip_first(parts[0])
        return b"".join(parts).decode("utf-8", "replace")

    def id_to_token(self, token_id: int) -> str:
        """The token as the vocabulary spells it; U+FFFD if there is none."""
        if not 0 <= token_id < self.vocab_size:
            return "\ufffd"
        return self._backend.id_to_token(token_id) or "\ufffd"

    def pieces(self, skip_special_tokens: bool) -> tuple[bytes, ...]:
        """The bytes of every id; empty for special tokens if those are skipped."""
        return self._pieces[skip_special_tokens]

    @property
    def strips_leading_space(self) -> bool:
        """Whether the first token of a text loses the space it begins with (sentencepiece)."""
        return self._leading_spaces != 0

    def strip_first(self, piece: bytes) -> bytes:
        """``piece``, which begins a text, without the space that encoding put before the text."""
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
        """The prompt that the chat template makes of ``messages``, rendered in jinja's sandbox.

        ``kwargs`` are the template's variables. ``ValueError`` with the template's own reason.
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
        except Exception as error:  # a template is the checkpoint's code: it may raise anything
            raise ValueError(str(error) or type(error).__name__) from error
        return str(text)

    def check_chat_template(self) -> None:
        """``ValueError`` if there is a chat template that does not compile."""
        from jinja2 import TemplateSyntaxError

        if self._template is None:
            return
        try:
            self.render_chat([{"role": "user", "content": ""}])
        except ValueError as error:
            cause = error.__cause__  # that a template refuses this trial message is no matter
            if isinstance(cause, TemplateSyntaxError):
                raise ValueError(f"chat template, line {cause.lineno}: {cause.message}") from cause


def _own_template(fast: PreTrainedTokenizerFast, path: Path, model_path: Path) -> str | None:
    named = fast.chat_template if isinstance(fast.chat_template, dict) else {}
    configured = named.get("default") if named else fast.chat_template
    template = _read_template(path) or configured or _read_template(model_path)
    if named and not template:
        log.warning(
            "no chat: of the chat templates %s none is called default; --chat-template chooses one",
            ", ".join(sorted(named)),
        )
    return template or None


def _read_template(directory: Path) -> str | None:
    file = directory / "chat_template.jinja"
    return file.read_text(encoding="utf-8") if file.is_file() else None


# --- the bytes of a token -----------------------------------------------------------------------


def _byte_alphabet() -> dict[str, int]:
    """The character that stands for each byte in a byte-level vocabulary, the other way round.

    Printable Latin-1 stands for itself; the other bytes have the characters from U+0100 on.
    """
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(b): b for b in printable} | {chr(256 + n): b for n, b in enumerate(others)}


_ALPHABET = _byte_alphabet()
_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")


@dataclass(frozen=True, slots=True)
class _Spelling:
    """How a vocabulary writes bytes as tokens."""

    byte_level: bool
    byte_fallback: bool
    replacements: tuple[tuple[str, str], ...]
    leading_spaces: int  # that the first token of a text loses: 0, 1 or _ALL_SPACES

    def to_bytes(self, token: str) -> bytes:
        """The bytes that ``token`` stands for."""
        if self.byte_level and all(c in _ALPHABET for c in token):
            return bytes([_ALPHABET[c] for c in token])
        if self.byte_fallback and (match := _BYTE_TOKEN.fullmatch(token)):
            return bytes.fromhex(match[1])
        for old, new in self.replacements:
            token = token.replace(old, new)
        return token.encode()


def _read_decoder(decoder: tokenizers.decoders.Decoder | None) -> _Spelling:
    """The spelling behind a decoder of `tokenizers`; ``ValueError`` for other kinds."""
    if decoder is None:
        raise ValueError("it has no decoder")
    state: dict[str, Any] = json.loads(decoder.__getstate__())
    parts = state.get("decoders", [state])
    if any(part.get("type") == "ByteLevel" for part in parts):
        # Every byte has its character: sentencepiece's steps beside it find nothing to act on.
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
