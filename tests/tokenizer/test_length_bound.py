"""LengthBound: never more tokens than a text has, and texts that are refused at little cost."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest
from tokenizers import AddedToken, Tokenizer, models, normalizers, pre_tokenizers

from serve.tokenizer.length_bound import LengthBound, read_length_bound
from tests.support.fake_service import load_test_tokenizer

SMOLLM2 = load_test_tokenizer()
WORDS = ["a", " the", "  ", "\n", "\t", " tokenization", "é", "日本", "🙂", "\x04", "0123", ". "]


@pytest.mark.parametrize("seed", range(8))
def test_never_more_than_the_text_has(seed: int) -> None:
    print("seed", seed)
    rng = random.Random(seed)
    some = rng.sample(WORDS, rng.randint(1, 4))
    text = "".join(rng.choices(some, k=rng.choice([0, 10, 1000, 60_000])))
    count = len(SMOLLM2.encode(text, add_special_tokens=False))
    for enough in (1, 100, 1000, 5000, 100_000):
        assert SMOLLM2.least_tokens(text, enough) <= count


def counting(bound: LengthBound, text: str, enough: int) -> tuple[int, int]:
    """Return the bound, and how many characters were tokenised for it."""
    read = 0

    def count(part: str) -> int:
        nonlocal read
        read += len(part)
        return len(SMOLLM2.encode(part, add_special_tokens=False))

    return bound.least_tokens(text, enough, count), read


def test_a_text_far_too_long_is_found_without_tokenising() -> None:
    text = "word " * 800_000
    least, read = counting(SMOLLM2._bound, text, 4000)
    assert least >= 4000
    assert read == 0


def test_a_text_over_the_context_is_tokenised_only_so_far() -> None:
    text = "word " * 800_000
    least, read = counting(SMOLLM2._bound, text, 100_000)
    assert 100_000 <= least <= 800_000
    assert read < 600_000  # of 4,000,000 characters; a word is a token here


def test_a_text_of_dropped_bytes_has_no_bound() -> None:
    text = "\x04" * 300_000
    assert SMOLLM2.encode(text, add_special_tokens=False) == []
    assert SMOLLM2.least_tokens(text, 100) == 0


def test_a_usual_text_costs_nothing() -> None:
    _, read = counting(SMOLLM2._bound, "word " * 5000, 8192)
    assert read == 0


VOCAB = {char: i for i, char in enumerate(pre_tokenizers.ByteLevel.alphabet())}


def byte_level() -> Tokenizer:
    backend = Tokenizer(models.BPE(VOCAB, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return backend


def with_normalizer(normalizer: Any) -> Callable[[], Tokenizer]:
    def build() -> Tokenizer:
        backend = byte_level()
        backend.normalizer = normalizer
        return backend

    return build


def with_unknown(fuse: bool) -> Callable[[], Tokenizer]:
    def build() -> Tokenizer:
        return Tokenizer(models.BPE({"<unk>": 0, "a": 1}, [], unk_token="<unk>", fuse_unk=fuse))

    return build


def with_swallowing_token() -> Tokenizer:
    backend = byte_level()
    backend.add_special_tokens([AddedToken("<mask>", lstrip=True)])
    return backend


def splitting_on_spaces() -> Tokenizer:
    backend = byte_level()
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Whitespace(), pre_tokenizers.ByteLevel()]
    )
    return backend


@pytest.mark.parametrize(
    ("build", "longest"),
    [
        (byte_level, 4),
        (with_normalizer(normalizers.NFC()), 16),
        (with_normalizer(normalizers.Replace(" ", "▁")), 4),
        (with_normalizer(normalizers.Replace("ab", "")), None),
        (with_normalizer(normalizers.Strip()), None),
        (with_normalizer(normalizers.Lowercase()), None),
        (with_normalizer(normalizers.Sequence([normalizers.NFC(), normalizers.Strip()])), None),
        (with_unknown(False), 4),
        (with_unknown(True), None),
        (with_swallowing_token, None),
        (splitting_on_spaces, None),
    ],
)
def test_only_steps_that_keep_the_text_have_a_bound(
    build: Callable[[], Tokenizer], longest: int | None
) -> None:
    backend = build()
    pieces = [b"x"] * backend.get_vocab_size()
    assert read_length_bound(backend, pieces).longest_piece == longest


def test_a_vocabulary_with_phrases_cannot_be_cut() -> None:
    bound = read_length_bound(byte_level(), [b"a", b"of the"])
    assert bound.tokens_of_a_cut is None
    assert read_length_bound(byte_level(), [b"a", b" the", b"\n "]).tokens_of_a_cut is not None


def test_composition_shrinks_by_four_at_most() -> None:
    """Every character that has a decomposition, spelled as long as Unicode allows."""
    import sys
    import unicodedata

    longest: dict[str, str] = {}  # by character: the longest single character that decomposes to it
    for code in range(sys.maxunicode + 1):
        char = chr(code)
        if 0xD800 <= code < 0xE000:
            continue
        plain = unicodedata.normalize("NFD", char)
        if len(plain) == 1 and len(char.encode()) > len(longest.get(plain, plain).encode()):
            longest[plain] = char
    for code in range(sys.maxunicode + 1):
        char = chr(code)
        if 0xD800 <= code < 0xE000:
            continue
        spelled = "".join(longest.get(c, c) for c in unicodedata.normalize("NFD", char))
        assert len(spelled.encode()) <= 4 * len(unicodedata.normalize("NFC", spelled).encode())
