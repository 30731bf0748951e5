r"""Load a sentencepiece model (tokenizer.model) into a tokenizer of the `tokenizers` library.

The rules of sentencepiece (Kudo and Richardson 2018; its normalizer.cc and bpe_model.cc) are built
from the parts of the library: character map, extra whitespace, the space before the text, then BPE
or unigram with byte fallback. Text encodes to the same ids as with sentencepiece, except that:

* special tokens are found in the text, because models that have them were trained this way;
* no space is put before a text that begins with a symbol which the model's author defined;
* a different one of several unigram segmentations with equal scores may be chosen, because
  sentencepiece adds scores in single precision and the library in double;
* the library maps ``\r\n``, and a letter with its combining mark, as one character. A character
  map that has only the first of the two characters drops the second.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from serve.tokenizer.config import AddedToken, TokenizerConfig

if TYPE_CHECKING:
    import tokenizers
    from transformers import PreTrainedTokenizerFast

_SPACE = "\u2581"
_UNIGRAM, _BPE = 1, 2  # trainer_spec.model_type
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED = 1, 2, 3, 4  # a piece's type; 5 is unused, 6 a byte
# Classes whose tokenizer.model can be loaded from the file and the configuration alone.
CLASSES = ("LlamaTokenizer", "CodeLlamaTokenizer", "GemmaTokenizer", "InternLM2Tokenizer")


@dataclass(frozen=True, slots=True)
class _Piece:
    """One entry of the vocabulary, after added tokens have replaced placeholders."""

    text: str
    score: float
    kind: int


def load_sentencepiece(file: Path, config: TokenizerConfig) -> PreTrainedTokenizerFast:
    """Load the tokenizer in ``file`` with the special tokens of ``config``.

    Raises ``ValueError`` with one line if the file cannot be read or is not supported.
    """
    from transformers import PreTrainedTokenizerFast

    proto = _read_proto(file)
    _check_supported(proto)
    pieces = {i: _Piece(p.piece, p.score, p.type) for i, p in enumerate(proto.pieces)}
    _place_added(pieces, config.added)
    named = _named_tokens(proto, pieces, config)
    backend = _build_backend(proto, pieces, config, named)
    # All named tokens are in the vocabulary: transformers would append others, with ids that the
    # model does not have.
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        chat_template=config.chat_template,
        clean_up_tokenization_spaces=False,
        **named,
    )


# --- the file -----------------------------------------------------------------------------------


def _read_proto(file: Path) -> Any:
    from sentencepiece import SentencePieceProcessor, sentencepiece_model_pb2

    data = file.read_bytes()
    try:
        SentencePieceProcessor(model_proto=data)  # checks more than the parser
    except RuntimeError as error:
        raise ValueError(f"{file.name} is not a sentencepiece model") from error
    proto = sentencepiece_model_pb2.ModelProto()
    proto.ParseFromString(data)
    if not proto.pieces:
        raise ValueError(f"{file.name} has no pieces")
    return proto


def _check_supported(proto: Any) -> None:
    """Raise ``ValueError`` for rules that the library cannot reproduce."""
    trainer, normalizer = proto.trainer_spec, proto.normalizer_spec
    if trainer.model_type not in (_UNIGRAM, _BPE):
        raise ValueError("a sentencepiece model of words or characters is not supported")
    if trainer.treat_whitespace_as_suffix or not normalizer.escape_whitespaces:
        raise ValueError(
            "a sentencepiece model with spaces after words or unmarked is not supported"
        )
    if proto.denormalizer_spec.precompiled_charsmap:
        raise ValueError("a sentencepiece model with a denormalizer is not supported")


def _place_added(pieces: dict[int, _Piece], added: Mapping[int, AddedToken]) -> None:
    """Put added tokens at their ids, in place of the vocabulary's placeholders."""
    ids = {piece.text: i for i, piece in pieces.items()}
    for token_id, token in added.items():
        if ids.get(token.content, token_id) != token_id:
            raise ValueError(
                f"added token {token.content!r} has id {token_id}, "
                f"but id {ids[token.content]} in tokenizer.model"
            )
        old = pieces.get(token_id)
        if token.special or old is None or old.text != token.content:
            pieces[token_id] = _Piece(token.content, 0.0, _CONTROL)


def _named_tokens(
    proto: Any, pieces: Mapping[int, _Piece], config: TokenizerConfig
) -> dict[str, str]:
    """Return bos, eos, unk and pad from the configuration, or else from the model file."""
    trainer = proto.trainer_spec
    own = {"bos": trainer.bos_id, "eos": trainer.eos_id, "unk": trainer.unk_id}
    named = {f"{k}_token": pieces[i].text if i in pieces else None for k, i in own.items()}
    named |= config.named
    vocabulary = {piece.text for piece in pieces.values()}
    if named.get("pad_token") not in vocabulary:
        named["pad_token"] = None  # not used here; fine-tuned models name one without adding it
    for token in (*named.values(), *config.extra_special):
        if token is not None and token not in vocabulary:
            raise ValueError(f"special token {token!r} is not in the vocabulary")
    return {key: token for key, token in named.items() if token is not None}


# --- the library's parts ------------------------------------------------------------------------


def _build_backend(
    proto: Any, pieces: Mapping[int, _Piece], config: TokenizerConfig, named: Mapping[str, str]
) -> tokenizers.Tokenizer:
    import tokenizers

    prefix = config.prefix_space
    if prefix is None:
        prefix = proto.normalizer_spec.add_dummy_prefix
    tokens = _added_tokens(pieces, config, {*named.values(), *config.extra_special})
    symbols = [t.content for t in tokens if t.normalized]
    backend = tokenizers.Tokenizer(_model(proto, pieces))
    backend.normalizer = _normalizer(proto, prefix and config.legacy, symbols)
    backend.pre_tokenizer = _pre_tokenizer(proto, prefix and not config.legacy)
    backend.add_tokens(tokens)
    backend.post_processor = _post_processor(backend, config, named)
    backend.decoder = _decoder(proto, prefix)
    return backend


def _model(proto: Any, pieces: Mapping[int, _Piece]) -> tokenizers.models.Model:
    from tokenizers import models

    spec = proto.trainer_spec
    ids = {piece.text: i for i, piece in pieces.items()}
    if spec.model_type == _BPE:
        unknown = pieces[spec.unk_id].text
        scores = {p.text: p.score for p in pieces.values() if p.kind == _NORMAL}
        return models.BPE(
            ids, _merges(scores), unk_token=unknown, fuse_unk=True, byte_fallback=spec.byte_fallback
        )
    if max(pieces) >= len(pieces):
        raise ValueError(f"the vocabulary has no token with id {_first_hole(pieces)}")
    # The library scores an unknown character 10 below the lowest score of all entries, and
    # sentencepiece 10 below the lowest of the normal ones. So the others get that lowest score.
    lowest = min((p.score for p in pieces.values() if p.kind == _NORMAL), default=0.0)
    ordered = [pieces[i] for i in range(len(pieces))]
    table = [(p.text, p.score if p.kind == _NORMAL else lowest) for p in ordered]
    return models.Unigram(table, unk_id=spec.unk_id, byte_fallback=spec.byte_fallback)


def _first_hole(pieces: Mapping[int, _Piece]) -> int:
    return next(i for i in range(len(pieces)) if i not in pieces)


def _merges(scores: Mapping[str, float]) -> list[tuple[str, str]]:
    """Return all pairs of pieces that join to a piece, the piece with the best score first.

    sentencepiece has no list of merges: it joins the neighbours whose joint piece scores best.
    """
    best_first = sorted(scores, key=lambda text: -scores[text])
    return [
        (left, right)
        for text in best_first
        for left, right in _halves(text)
        if left in scores and right in scores
    ]


def _halves(text: str) -> Iterator[tuple[str, str]]:
    return ((text[:i], text[i:]) for i in range(1, len(text)))


def _normalizer(
    proto: Any, prefix_always: bool, symbols: Sequence[str]
) -> tokenizers.normalizers.Normalizer:
    from tokenizers import Regex, normalizers

    spec = proto.normalizer_spec
    steps: list[normalizers.Normalizer] = []
    if spec.precompiled_charsmap:
        steps.append(normalizers.Precompiled(spec.precompiled_charsmap))
    if spec.remove_extra_whitespaces:
        steps.append(normalizers.Replace(Regex(rf"\A +|[ {_SPACE}]+\z"), ""))
        steps.append(normalizers.Replace(Regex(" {2,}"), " "))
    if prefix_always:
        # The library also normalizes the symbols themselves, which must not get a space.
        alone = "|".join(re.escape(symbol) for symbol in symbols)
        start = rf"\A(?!(?:{alone})\z)" if alone else r"\A(?!\z)"
        steps.append(normalizers.Replace(Regex(start), _SPACE))
    steps.append(normalizers.Replace(" ", _SPACE))
    return normalizers.Sequence(steps)


def _pre_tokenizer(proto: Any, prefix_first: bool) -> tokenizers.pre_tokenizers.PreTokenizer | None:
    from tokenizers import Regex, pre_tokenizers

    steps: list[pre_tokenizers.PreTokenizer] = []
    if prefix_first:
        # Metaspace puts no space before text that begins with its mark. So the mark of the first
        # step is a plain space, which normalized text never has. The second step replaces it with
        # the real mark.
        for mark, scheme in ((" ", "first"), (_SPACE, "never")):
            steps.append(pre_tokenizers.Metaspace(mark, prepend_scheme=scheme, split=False))
    if proto.trainer_spec.model_type == _UNIGRAM and proto.trainer_spec.byte_fallback:
        # The library would find names such as <0x0A> in the text and read them as bytes. Splitting
        # them prevents that.
        name = Regex("<0(?=x[0-9A-F]{2}>)")
        steps.append(pre_tokenizers.Split(name, "merged_with_previous"))
    return pre_tokenizers.Sequence(steps) if steps else None


def _added_tokens(
    pieces: Mapping[int, _Piece], config: TokenizerConfig, special: set[str]
) -> list[tokenizers.AddedToken]:
    """Return the tokens to find in text, by id.

    Symbols that the model's author defined are found in normalized text, as in sentencepiece. The
    others are found in raw text, as in the Python tokenizers of transformers.
    """
    from tokenizers import AddedToken as LibraryToken

    found = []
    for token_id in sorted(pieces):
        piece = pieces[token_id]
        added = config.added.get(token_id)
        is_special = piece.text in special or piece.kind == _UNKNOWN
        if piece.kind == _USER_DEFINED and not is_special:
            found.append(LibraryToken(piece.text, normalized=True, special=False))
        elif added is not None or is_special or piece.kind == _CONTROL:
            added = added or AddedToken(piece.text, special=True)
            found.append(
                LibraryToken(
                    piece.text,
                    single_word=added.single_word,
                    lstrip=added.lstrip,
                    rstrip=added.rstrip,
                    normalized=False,
                    special=added.special or is_special,
                )
            )
    return found


def _post_processor(
    backend: tokenizers.Tokenizer, config: TokenizerConfig, named: Mapping[str, str]
) -> tokenizers.processors.PostProcessor:
    from tokenizers import processors

    bos = [named["bos_token"]] if config.add_bos and "bos_token" in named else []
    eos = [named["eos_token"]] if config.add_eos and "eos_token" in named else []
    return processors.TemplateProcessing(
        single=[*bos, "$A", *eos],
        special_tokens=[(token, backend.token_to_id(token)) for token in {*bos, *eos}],
    )


def _decoder(proto: Any, prefix: bool) -> tokenizers.decoders.Decoder:
    from tokenizers import decoders

    steps: list[decoders.Decoder] = [decoders.Replace(_SPACE, " ")]
    if proto.trainer_spec.byte_fallback:
        steps.append(decoders.ByteFallback())
    steps.append(decoders.Fuse())
    if prefix or proto.normalizer_spec.remove_extra_whitespaces:
        steps.append(decoders.Strip(content=" ", left=1, right=0))
    return decoders.Sequence(steps)
