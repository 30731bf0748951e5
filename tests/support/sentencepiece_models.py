"""Small sentencepiece models of every kind, and directories with one."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import sentencepiece
from sentencepiece import sentencepiece_model_pb2

from serve.tokenizer.tokenizer import Tokenizer, load_tokenizer

TEXTS = [
    "",
    " ",
    "     ",
    "the quick brown fox",
    "  two spaces,   three\tand a tab  ",
    "\n\nlines\n \n  indented\r\n",
    "naïve café, 東京タワー, Привет, 🙂👩‍🚀",
    "\u2581marked\u2581 \u2581",
    "<0x41> is no byte, <unk",
    "x = 1234 + 5.6e-7 == 0",
]
WORDS = [
    *("the", "quick", "brown", "fox", "jumps", "over", "a", "lazy", "dog;", "how", "are", "you?"),
    *("12", "345", "日本", "東京", "naïve", "été"),
]
ALPHABET = "aabcdehoqrtu   \n\t1234日本東京é🙂ж\u2581<>x,."


def train(**options: Any) -> bytes:
    """Train a small sentencepiece model. Return the bytes of its tokenizer.model."""
    rng = random.Random(7)
    separators = [" ", " ", " ", "  ", "    "]
    lines = (
        "".join(rng.choice(WORDS) + rng.choice(separators) for _ in range(12)) for _ in range(300)
    )
    file = _Buffer()
    given: dict[str, Any] = {
        "model_type": "bpe",
        "byte_fallback": True,
        "add_dummy_prefix": True,
        "vocab_size": 420,
        "normalization_rule_name": "identity",
        "remove_extra_whitespaces": False,
        "allow_whitespace_only_pieces": True,
    }
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=lines,
        model_writer=file,
        hard_vocab_limit=False,
        num_threads=1,
        minloglevel=2,
        **(given | options),
    )
    return bytes(file.data)


class _Buffer:
    def __init__(self) -> None:
        self.data = bytearray()

    def write(self, data: bytes) -> None:
        self.data += data


MODELS: dict[str, dict[str, Any]] = {
    f"{kind}{'-bytes' * fallback}{'-prefix' * prefix}": {
        "model_type": kind,
        "byte_fallback": bool(fallback),
        "add_dummy_prefix": bool(prefix),
        "vocab_size": 150 + 270 * fallback,
    }
    for kind in ("bpe", "unigram")
    for fallback in (0, 1)
    for prefix in (0, 1)
} | {
    "bpe-whitespace": {"remove_extra_whitespaces": True},
    "bpe-nfkc": {"normalization_rule_name": "nmt_nfkc", "remove_extra_whitespaces": True},
    "unigram-nfkc": {"model_type": "unigram", "normalization_rule_name": "nmt_nfkc"},
    "bpe-digits": {"split_digits": True},
    "bpe-symbols": {"user_defined_symbols": ["<sep>", "\u2581\u2581", "\n\n"]},
    "bpe-symbols-bare": {
        "user_defined_symbols": ["<sep>", "\u2581\u2581", "\n\n"],
        "add_dummy_prefix": False,
    },
}


@cache
def model(name: str) -> bytes:
    """Return a model of MODELS, trained once."""
    return train(**MODELS[name])


def processor(data: bytes, **normalizer: bool) -> sentencepiece.SentencePieceProcessor:
    """Return sentencepiece's own tokenizer, with fields of its normalizer changed."""
    proto = sentencepiece_model_pb2.ModelProto.FromString(data)
    for key, value in normalizer.items():
        setattr(proto.normalizer_spec, key, value)
    return sentencepiece.SentencePieceProcessor(model_proto=proto.SerializeToString())


def load(directory: Path, data: bytes, config: Mapping[str, Any] | None = None) -> Tokenizer:
    """Load our tokenizer from a directory with ``data`` as tokenizer.model."""
    (directory / "tokenizer.model").write_bytes(data)
    if config is not None:
        (directory / "tokenizer_config.json").write_text(json.dumps(config))
    return load_tokenizer(str(directory), str(directory), None)


def random_texts(seed: int, count: int) -> Iterator[str]:
    rng = random.Random(seed)
    for _ in range(count):
        parts = [*rng.choices(ALPHABET, k=20), *rng.choices(WORDS, k=6)]
        yield "".join(rng.sample(parts, rng.randrange(len(parts) + 1)))
