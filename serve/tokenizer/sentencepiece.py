"""A sentencepiece model (tokenizer.model) as a tokenizer of the `tokenizers` library.

The model's own rules (Kudo and Richardson 2018; sentencepiece's normalizer.cc and bpe_model.cc) are
said again in the library's parts: character map, extra whitespace, the space before the text, then
BPE or unigram with byte fallback. Text encodes to the same ids as with sentencepiece itself, but:

* special tokens are found in the text, as the models that have them were trained;
* a text that begins with a symbol which the model's author defined gets no space before it;
* of unigram segmentations with equal scores another one may be taken (sentencepiece adds in single
  precision, the library in double);
* the library maps ``\\r\\n`` and a letter with its combining mark as one character, so a character
  map that knows only the first of the two drops the second.
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
# Classes whose tokenizer.model needs nothing that their code would do beyond the configuration.
CLASSES = ("LlamaTokenizer", "CodeLlamaTokenizer", "GemmaTokenizer", "InternLM2Tokenizer")


@dataclass(frozen=True, slots=True)
class _Piece:
    """One entry of the vocabulary, after the configuration's added tokens took their ids."""

    text: str
    score: float
    kind: int


def load_sentencepiece(file: Path, config: TokenizerConfig) -> PreTrainedTokenizerFast:
    """The tokenizer of ``file`` with ``config``'s special tokens; ``ValueError`` in one line."""
    from transformers import PreTrainedTokenizerFast

    proto = _read_proto(file)
    _check_supported(proto)
    pieces = {i: _Piece(p.piece, p.score, p.type) for i, p in enumerate(proto.pieces)}
    _place_added(pieces, config.added)
    named = _named_tokens(proto, pieces, config)
    backend = _build_backend(proto, pieces, config, named)
    # Tokens that the vocabulary lacks would be appended to it, at ids that the model lacks.
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
        SentencePieceProcessor(model_proto=data)  # it checks more than the parser does
    except RuntimeError as error:
        raise ValueError(f"{file.name} is no sentencepiece model") from error
    proto = sentencepiece_model_pb2.ModelProto()
    proto.ParseFromString(data)
    if not proto.pieces:
        raise ValueError(f"{file.name} has no pieces")
    return proto


def _check_supported(proto: Any) -> None:
    """``ValueError`` for rules that the library cannot follow."""
    trainer, normalizer = proto.trainer_spec, proto.normalizer_spec
    if trainer.model_type not in (_UNIGRAM, _BPE):
        raise ValueError("a sentencepiece model of words or characters is not supported")
    if trainer.treat_whitespace_as_suffix or not normalizer.escape_whitespaces:
        raise ValueError("a sentencepiece model with spaces behind or unmarked is not supported")
    if proto.denormalizer_spec.precompiled_charsmap:
        raise ValueError("a sentencepiece model with a denormalizer is not supported")


def _place_added(pieces: dict[int, _Piece], added: Mapping[int, AddedToken]) -> None:
    """Put added tokens at their ids, over the placeholders that the vocabulary keeps for them."""
    ids = {piece.text: i for i, piece in pieces.items()}
    for token_id, token in added.items():
        if ids.get(token.content, token_id) != token_id:
            raise ValueError(
                f"added token {token.content!r} has id {token_id}, "
                f"but {ids[token.content]} in tokenizer.model"
            )
        old = pieces.get(token_id)
        if token.special or old is None or old.text != token.content:
            pieces[token_id] = _Piece(token.content, 0.0, _CONTROL)


def _named_tokens(
    proto: Any, pieces: Mapping[int, _Piece], config: TokenizerConfig
) -> dict[str, str]:
    """bos, eos, unk and pad: the configuration's, else the model's own."""
    trainer = proto.trainer_spec
    own = {"bos": trainer.bos_id, "eos": trainer.eos_id, "unk": trainer.unk_id}
    named = {f"{k}_token": pieces[i].text if i in pieces else None for k, i in own.items()}
    named |= config.named
    vocabulary = {piece.text for piece in pieces.values()}
    if named.get("pad_token") not in vocabulary:
        named["pad_token"] = None  # nothing here pads; fine-tuners name one without adding it
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
    # An unknown character costs 10 more than the lowest score of all entries, where sentencepiece
    # counts those of text alone: the others take that lowest one.
    lowest = min((p.score for p in pieces.values() if p.kind == _NORMAL), default=0.0)
    ordered = [pieces[i] for i in range(len(pieces))]
    table = [(p.text, p.score if p.kind == _NORMAL else lowest) for p in ordered]
    return models.Unigram(table, unk_id=spec.unk_id, byte_fallback=spec.byte_fallback)


def _first_hole(pieces: Mapping[int, _Piece]) -> int:
    return next(i for i in range(len(pieces)) if i not in pieces)


def _merges(scores: Mapping[str, float]) -> list[tuple[str, str]]:
    """All pairs of pieces that join to a piece, the best piece first.

    sentencepiece keeps no list of merges: it joins the neighbours with the best joint piece.
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
        # The library runs the symbols themselves through here too, where no space may be put.
        alone = "|".join(re.escape(symbol) for symbol in symbols)
        start = rf"\A(?!(?:{alone})\z)" if alone else r"\A(?!\z)"
        steps.append(normalizers.Replace(Regex(start), _SPACE))
    steps.append(normalizers.Replace(" ", _SPACE))
    return normalizers.Sequence(steps)


def _pre_tokenizer(proto: Any, prefix_first: bool) -> tokenizers.pre_tokenizers.PreTokenizer | None:
    from tokenizers import Regex, pre_tokenizers

    steps: list[pre_tokenizers.PreTokenizer] = []
    if prefix_first:
        # Metaspace puts no space before text that begins with its mark. The first one's mark is a
        # plain space, of which normalizing has left none; the second one makes it the real mark.
        for mark, scheme in ((" ", "first"), (_SPACE, "never")):
            steps.append(pre_tokenizers.Metaspace(mark, prepend_scheme=scheme, split=False))
    if proto.trainer_spec.model_type == _UNIGRAM and proto.trainer_spec.byte_fallback:
        # The library would find the name of a byte's piece in the text: never let it see one whole.
        name = Regex("<0(?=x[0-9A-F]{2}>)")
        steps.append(pre_tokenizers.Split(name, "merged_with_previous"))
    return pre_tokenizers.Sequence(steps) if steps else None


def _added_tokens(
    pieces: Mapping[int, _Piece], config: TokenizerConfig, special: set[str]
) -> list[tokenizers.AddedToken]:
    """The tokens to find in text, by id.

    Symbols that the model's author defined are found in normalized text, as sentencepiece does;
    the others in raw text, as transformers' tokenizers in Python do.
    """
    from tokenizers import AddedToken as LibraryToken

    found = []
    for token_id in sorted(pieces):
        piece = pieces[token_id]
        given = config.added.get(token_id)
        is_special = piece.text in special or piece.kind == _UNKNOWN
        if piece.kind == _USER_DEFINED and not is_special:
            found.append(LibraryToken(piece.text, normalized=True, special=False))
        elif given is not None or is_special or piece.kind == _CONTROL:
            given = given or AddedToken(piece.text, special=True)
            found.append(
                LibraryToken(
                    piece.text,
                    single_word=given.single_word,
                    lstrip=given.lstrip,
                    rstrip=given.rstrip,
                    normalized=False,
                    special=given.special or is_special,
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
