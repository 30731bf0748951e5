"""Which files hold a tokenizer, and how each kind becomes one of the `tokenizers` library.

In this order: a GGUF file's metadata, ``tokenizer.json``, a sentencepiece ``tokenizer.model``, and
what else transformers has a class for. Code that comes with a checkpoint is never run.
"""

from __future__ import annotations

import struct
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from serve.tokenizer.config import find_remote_class, read_tokenizer_config
from serve.tokenizer.sentencepiece import CLASSES, load_sentencepiece

if TYPE_CHECKING:
    import tokenizers
    from transformers import PreTrainedTokenizerFast

_GGUF_SIZES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
_GGUF_STRING, _GGUF_ARRAY = 8, 9


def load_fast(path: Path) -> PreTrainedTokenizerFast:
    """The tokenizer of a directory or a ``.gguf`` file; any error if there is no usable one."""
    if path.suffix == ".gguf":
        return _load_gguf(path)
    if not path.is_dir():
        raise ValueError("neither a directory nor a .gguf file")
    if (path / "tokenizer.json").is_file():
        return _load_json(path)
    if (path / "tokenizer.model").is_file():
        return _load_model_file(path)
    return _load_by_class(path)


def _load_json(path: Path) -> PreTrainedTokenizerFast:
    """tokenizer.json says how the model's text was split. transformers 5 would keep of it only the
    vocabulary, and split as the class does that tokenizer_config.json names.
    """
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast.from_pretrained(str(path), local_files_only=True)


def _load_model_file(path: Path) -> PreTrainedTokenizerFast:
    config = read_tokenizer_config(path)
    name = (config.tokenizer_class or CLASSES[0]).removesuffix("Fast")
    if name in (*CLASSES, "PreTrainedTokenizer", "TokenizersBackend"):
        return load_sentencepiece(path / "tokenizer.model", config)
    if config.remote_class is None and _is_known(name):
        return _load_by_class(path)
    raise ValueError(
        f"tokenizer.model of the class {config.remote_class or name}: "
        f"supported are {', '.join(CLASSES)}; else tokenizer.json is needed"
    )


def _is_known(name: str) -> bool:
    from transformers.models.auto.tokenization_auto import tokenizer_class_from_name

    return tokenizer_class_from_name(name) is not None


def _load_by_class(path: Path) -> PreTrainedTokenizerFast:
    from transformers import AutoTokenizer

    try:
        fast = AutoTokenizer.from_pretrained(
            str(path), trust_remote_code=False, local_files_only=True, use_fast=True
        )
    except ValueError as error:
        if (name := find_remote_class(path)) is None:
            raise
        raise ValueError(
            f"{name} is code of the checkpoint, which is never run: "
            "tokenizer.json or tokenizer.model is needed"
        ) from error
    if not getattr(fast, "is_fast", False):
        raise ValueError(f"{type(fast).__name__} cannot be loaded by the tokenizers library")
    return fast


def _load_gguf(path: Path) -> PreTrainedTokenizerFast:
    # AutoTokenizer would parse the whole file for a config first, which takes seconds.
    from transformers import PreTrainedTokenizerFast

    if not path.is_file():
        raise ValueError("no such file")
    fast = PreTrainedTokenizerFast.from_pretrained(
        str(path.parent), gguf_file=path.name, local_files_only=True
    )
    _split_digits(fast.backend_tokenizer, path)
    return fast


def _split_digits(backend: tokenizers.Tokenizer, path: Path) -> None:
    """Restore the splitting at digits, which transformers leaves out for these vocabularies: it
    reads ``"a  12"`` as ``a, ' ', ' ', 1, 2``; the model was trained on ``a, '  ', 1, 2``.
    """
    from tokenizers import pre_tokenizers

    if not isinstance(backend.pre_tokenizer, pre_tokenizers.ByteLevel):
        return  # split by a pattern that transformers knows, or sentencepiece
    with path.open("rb") as file:
        name = _gguf_string(file, "tokenizer.ggml.pre")
    if name in ("smollm", "starcoder", "refact", "command-r", "codeshell", "exaone"):
        digits = pre_tokenizers.Digits(individual_digits=True)
        backend.pre_tokenizer = pre_tokenizers.Sequence([digits, backend.pre_tokenizer])
    elif name not in (None, "default", "gpt-2"):
        raise ValueError(f"the file names an unknown pre-tokenizer, {name!r}: give --tokenizer")


def _gguf_string(file: BinaryIO, wanted: str) -> str | None:
    """The string under key ``wanted`` of a GGUF file (version 2 or 3), None if there is none.

    gguf's own reader would take seconds, for every word of the vocabulary.
    """

    def number(code: str) -> int:
        (value,) = struct.unpack(f"<{code}", file.read(struct.calcsize(f"<{code}")))
        return int(value)

    def skip(kind: int) -> None:
        if kind == _GGUF_ARRAY:
            element, count = number("I"), number("Q")
            if element in _GGUF_SIZES:
                file.seek(_GGUF_SIZES[element] * count, 1)
            else:
                for _ in range(count):
                    skip(element)
        else:
            file.seek(number("Q") if kind == _GGUF_STRING else _GGUF_SIZES[kind], 1)

    file.seek(16)  # magic, version, number of tensors
    for _ in range(number("Q")):
        key = file.read(number("Q")).decode()
        kind = number("I")
        if key == wanted and kind == _GGUF_STRING:
            return file.read(number("Q")).decode()
        skip(kind)
    return None
