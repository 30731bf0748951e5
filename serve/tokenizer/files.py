"""Load a tokenizer of the `tokenizers` library from the files of a checkpoint.

The kinds of files, in the order in which they are tried: a GGUF file's metadata,
``tokenizer.json``, a sentencepiece ``tokenizer.model``, and files of the other classes that
transformers knows. Code in a checkpoint is never run.
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
    """Load the tokenizer of a directory or a ``.gguf`` file.

    Raises exceptions of many types if there is no usable one, because the libraries do.
    """
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
    from transformers import PreTrainedTokenizerFast

    # Not the class that tokenizer_config.json names: in transformers 5 it takes only the vocabulary
    # from tokenizer.json and splits text by its own rules. The model was trained with the rules in
    # tokenizer.json.
    return PreTrainedTokenizerFast.from_pretrained(str(path), local_files_only=True)


def _load_model_file(path: Path) -> PreTrainedTokenizerFast:
    config = read_tokenizer_config(path)
    name = (config.tokenizer_class or CLASSES[0]).removesuffix("Fast")
    if name in (*CLASSES, "PreTrainedTokenizer", "TokenizersBackend"):
        return load_sentencepiece(path / "tokenizer.model", config)
    if config.remote_class is None and _is_known(name):
        return _load_by_class(path)
    raise ValueError(
        f"tokenizer.model of the class {config.remote_class or name} is not supported; "
        f"supported: {', '.join(CLASSES)}; other classes need tokenizer.json"
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
            f"{name} is code in the checkpoint, which is never run; "
            "tokenizer.json or tokenizer.model is needed"
        ) from error
    if not getattr(fast, "is_fast", False):
        raise ValueError(f"{type(fast).__name__} cannot be loaded by the tokenizers library")
    return fast


def _load_gguf(path: Path) -> PreTrainedTokenizerFast:
    # Not AutoTokenizer: it first parses the whole file for a model config, which takes seconds.
    from transformers import PreTrainedTokenizerFast

    if not path.is_file():
        raise ValueError("no such file")
    fast = PreTrainedTokenizerFast.from_pretrained(
        str(path.parent), gguf_file=path.name, local_files_only=True
    )
    _split_digits(fast.backend_tokenizer, path)
    return fast


def _split_digits(backend: tokenizers.Tokenizer, path: Path) -> None:
    """Restore the splitting of numbers into digits, which transformers omits for GGUF files.

    It splits ``"a  12"`` into ``a, ' ', ' ', 1, 2``, but the models were trained with
    ``a, '  ', 1, 2``.
    """
    from tokenizers import pre_tokenizers

    if not isinstance(backend.pre_tokenizer, pre_tokenizers.ByteLevel):
        return  # sentencepiece, or a pattern that transformers restores
    with path.open("rb") as file:
        name = _gguf_string(file, "tokenizer.ggml.pre")
    if name in ("smollm", "starcoder", "refact", "command-r", "codeshell", "exaone"):
        digits = pre_tokenizers.Digits(individual_digits=True)
        backend.pre_tokenizer = pre_tokenizers.Sequence([digits, backend.pre_tokenizer])
    elif name not in (None, "default", "gpt-2"):
        raise ValueError(f"the GGUF file has an unknown pre-tokenizer, {name!r}: give --tokenizer")


def _gguf_string(file: BinaryIO, name: str) -> str | None:
    """Return the metadata string ``name`` of a GGUF file (version 2 or 3), or None.

    The reader of the package gguf takes seconds, because it reads every word of the vocabulary.
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
        if key == name and kind == _GGUF_STRING:
            return file.read(number("Q")).decode()
        skip(kind)
    return None
