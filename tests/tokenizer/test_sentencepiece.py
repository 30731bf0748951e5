"""tokenizer.model files give the same ids and texts as sentencepiece and transformers."""

from __future__ import annotations

import random
import re
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest
import sentencepiece
from sentencepiece import sentencepiece_model_pb2
from transformers import LlamaTokenizer

from serve.request import SamplingParams
from serve.tokenizer.detokenizer import Detokenizer
from serve.tokenizer.tokenizer import Tokenizer
from tests.support.sentencepiece_models import MODELS, TEXTS, load, model, processor, random_texts


def assert_incremental(tokenizer: Tokenizer, ids: list[int], skip: bool) -> None:
    output = Detokenizer(tokenizer, SamplingParams(max_tokens=1, skip_special_tokens=skip), ())
    pushed = "".join(output.push(i).text for i in ids) + output.finish()
    assert pushed == tokenizer.decode(ids, skip)


def one_mark(text: str) -> str:
    """Join runs of U+FFFD, because decoders may give a broken character any number of them."""
    return re.sub("\ufffd+", "\ufffd", text)


def assert_same_cut(
    reference: sentencepiece.SentencePieceProcessor,
    ids: list[int],
    expected: list[int],
    exactly: bool,
) -> None:
    """Check that the ids are the same or, unless ``exactly``, another cut with the same score."""
    if exactly or ids == expected:
        assert ids == expected
        return
    assert reference.decode(ids) == reference.decode(expected)
    scores = [sum(map(reference.get_score, cut)) for cut in (ids, expected)]
    assert scores[0] == pytest.approx(scores[1], rel=1e-5)


# --- the same as sentencepiece -------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
def test_ids_and_texts_are_sentencepieces(name: str, tmp_path: Path) -> None:
    reference = processor(model(name))
    tokenizer = load(tmp_path, model(name), {"tokenizer_class": "LlamaTokenizer"})
    bos, unknown = reference.bos_id(), reference.unk_id()
    for text in [*TEXTS, *random_texts(11, 300)]:
        if name == "bpe-symbols" and re.match("\n\n|[ \u2581]{2}", text):
            continue  # see test_a_symbol_at_the_start
        if name == "unigram-nfkc" and "\r\n" in text:
            continue  # the library maps it as one character
        ids = tokenizer.encode(text, add_special_tokens=False)
        assert_same_cut(reference, ids, reference.encode(text), exactly="unigram" not in name)
        assert tokenizer.encode(text) == [bos, *ids]
        if unknown in ids or (name == "bpe-whitespace" and text.startswith("\u2581")):
            # sentencepiece shows unk as " ⁇ ", and strips a leading U+2581 only in decoding.
            pass
        else:
            assert tokenizer.decode([bos, *ids]) == reference.decode(ids)
        assert_incremental(tokenizer, [bos, *ids], True)
        assert_incremental(tokenizer, [bos, *ids], False)


@pytest.mark.parametrize("name", [name for name in MODELS if "nfkc" not in name])
def test_random_ids_read_as_in_sentencepiece(name: str, tmp_path: Path) -> None:
    reference = processor(model(name))
    tokenizer = load(tmp_path, model(name))
    rng = random.Random(5)
    shown = range(3, tokenizer.vocab_size)  # without unk, bos and eos
    space = reference.piece_to_id("<0x20>")
    for _ in range(200):
        ids = rng.choices(shown, k=rng.randrange(12))
        if ids[:1] == [space]:
            continue  # sentencepiece keeps a leading space that is spelled as a byte
        if MODELS[name].get("remove_extra_whitespaces"):
            ids = reference.encode(
                reference.decode(ids)
            )  # decoding strips whitespace that encoding never produces
        assert one_mark(tokenizer.decode(ids)) == one_mark(reference.decode(ids))
        assert_incremental(tokenizer, ids, True)


@pytest.mark.parametrize("text", [t for t in TEXTS if "\u2581" not in t])
def test_text_survives_the_round_trip(text: str, tmp_path: Path) -> None:
    for name in ("bpe-bytes", "bpe-bytes-prefix", "unigram-bytes", "unigram-bytes-prefix"):
        tokenizer = load(tmp_path, model(name))
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_a_symbol_at_the_start_has_no_space_before_it(tmp_path: Path) -> None:
    tokenizer = load(tmp_path, model("bpe-symbols"))
    reference = processor(model("bpe-symbols"))
    symbol, space = reference.piece_to_id("<sep>"), reference.piece_to_id("\u2581")
    assert tokenizer.encode("<sep>", False) == [symbol]
    assert reference.encode("<sep>") == [space, symbol]
    assert tokenizer.encode("the<sep>the <sep>", False) == reference.encode("the<sep>the <sep>")
    assert tokenizer.decode([symbol, symbol]) == "<sep><sep>"


# --- special tokens and the configuration --------------------------------------------------------


def reference_ids(data: bytes, text: str, special: Mapping[str, int], legacy: bool) -> list[int]:
    """Cut ``text`` at special tokens and encode every stretch with sentencepiece."""
    first, later = processor(data), processor(data, add_dummy_prefix=False)
    ids: list[int] = []
    start = 0
    for part in re.split(f"({'|'.join(map(re.escape, special))})", text):
        encode = (first if legacy or not start else later).encode
        ids += [special[part]] if part in special else encode(part)
        start += len(part)
    return ids


def texts_with(special: Mapping[str, int], seed: int, count: int) -> Iterator[str]:
    rng = random.Random(seed)
    for text in random_texts(seed, count):
        cuts = sorted(rng.choices(range(len(text) + 1), k=rng.randrange(4)))
        parts = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
        yield "".join(part + rng.choice([*special, ""]) for part in parts)


@pytest.mark.parametrize("legacy", [True, False, None])
@pytest.mark.parametrize("name", ["bpe-bytes-prefix", "bpe-bytes", "unigram-prefix"])
def test_special_tokens_in_text(name: str, legacy: bool | None, tmp_path: Path) -> None:
    tokenizer = load(tmp_path, model(name), {"legacy": legacy})
    special = {"<s>": 1, "</s>": 2, "<unk>": 0}
    for text in texts_with(special, 3, 150):
        expected = reference_ids(model(name), text, special, legacy is not False)
        assert tokenizer.encode(text, False) == expected, text
        for skip in (True, False):
            assert_incremental(tokenizer, expected, skip)


def internlm2(directory: Path, name: str) -> tuple[Tokenizer, dict[str, int]]:
    """Make a directory like InternLM2's: placeholders for added tokens and a class of its own."""
    proto = sentencepiece_model_pb2.ModelProto.FromString(model(name))
    start = len(proto.pieces)
    contents = ("plugin", "interpreter", "action_end", "action_start", "im_end", "im_start")
    special = {f"<|{content}|>": start + n for n, content in enumerate(contents)}
    for number in range(6):
        proto.pieces.add(piece=f"[UNUSED_TOKEN_{141 + number}]", score=0.0, type=4)
    auto_map = ["tokenization_internlm2.InternLM2Tokenizer", None]
    named = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "</s>"}
    config = named | {
        "tokenizer_class": "InternLM2Tokenizer",
        "auto_map": {"AutoTokenizer": auto_map},
        "sp_model_kwargs": None,
        "additional_special_tokens": list(special),
        "added_tokens_decoder": {
            str(i): {"content": token, "special": True, "normalized": False}
            for token, i in (special | {"<unk>": 0, "<s>": 1, "</s>": 2}).items()
        },
        "chat_template": "{{ bos_token }}{% for m in messages %}<|im_start|>{{ m.role }}\n"
        "{{ m.content }}<|im_end|>\n{% endfor %}",
    }
    return load(directory, proto.SerializeToString(), config), special


@pytest.mark.parametrize("name", ["bpe-bytes", "bpe-bytes-prefix"])
def test_internlm2(name: str, tmp_path: Path) -> None:
    tokenizer, special = internlm2(tmp_path, name)
    every = special | {"<s>": 1, "</s>": 2}
    for text in texts_with(every, 9, 100):
        expected = reference_ids(model(name), text, every, True)
        assert tokenizer.encode(text) == [1, *expected], text
    assert tokenizer.eos_token_id == 2
    assert tokenizer.vocab_size == max(special.values()) + 1
    for token, token_id in special.items():
        assert tokenizer.id_to_token(token_id) == token
        assert tokenizer.decode([token_id]) == ""
        assert tokenizer.decode([token_id], skip_special_tokens=False) == token
    prompt = tokenizer.render_chat([{"role": "user", "content": "how are you?"}])
    assert prompt == "<s><|im_start|>user\nhow are you?<|im_end|>\n"
    ids = tokenizer.encode(prompt, False)
    assert ids[:2] == [1, special["<|im_start|>"]]
    assert special["<|im_end|>"] in ids


@pytest.mark.parametrize("legacy", [True, False])
def test_as_transformers_reads_a_llama_directory(legacy: bool, tmp_path: Path) -> None:
    data = model("bpe-bytes-prefix")
    config = {
        "tokenizer_class": "LlamaTokenizer",
        "add_bos_token": True,
        "add_eos_token": False,
        "legacy": legacy,
        "bos_token": {"content": "<s>", "__type": "AddedToken"},
        "eos_token": "</s>",
        "unk_token": "<unk>",
    }
    tokenizer = load(tmp_path, data, config)
    expected_tokenizer = LlamaTokenizer.from_pretrained(str(tmp_path))
    special = {"<s>": 1, "</s>": 2}
    for text in [*TEXTS, *texts_with(special, 21, 150)]:
        # transformers puts no space before a stretch of text that begins with one.
        text = re.sub("(^|>)[ \u2581]+", r"\1", text)
        ids = tokenizer.encode(text)
        assert ids == expected_tokenizer.encode(text), text
        for skip in (True, False):
            whole = expected_tokenizer.decode(ids, skip_special_tokens=skip)
            assert tokenizer.decode(ids, skip) == whole
