"""Which files make a tokenizer, what their configuration changes, and whose code never runs."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from transformers import LlamaTokenizer

from serve.tokenizer.tokenizer import load_tokenizer
from tests.support.sentencepiece_models import load, model, processor, train

# --- what the configuration changes ---------------------------------------------------------------


def test_flags_of_the_configuration(tmp_path: Path) -> None:
    data = model("bpe-bytes-prefix")
    plain = processor(data).encode("the fox")
    bare = processor(data, add_dummy_prefix=False).encode("the fox")
    config = {"add_bos_token": False, "add_eos_token": True}
    assert load(tmp_path, data, config).encode("the fox") == [*plain, 2]
    assert load(tmp_path, data, {"add_bos_token": False}).encode("the fox") == plain
    without = load(tmp_path, data, {"add_prefix_space": False})
    assert without.encode("the fox") == [1, *bare]
    assert without.decode(without.encode(" the")) == " the"
    assert load(tmp_path, data, {"add_prefix_space": None}).encode("the fox") == [1, *plain]
    added = load(tmp_path, model("bpe-bytes"), {"add_prefix_space": True})
    expected = processor(model("bpe-bytes"), add_dummy_prefix=True).encode("the fox")
    assert added.encode("the fox") == [1, *expected]
    assert added.decode(added.encode("the fox")) == "the fox"


def test_a_token_beyond_the_vocabulary_and_its_stripping(tmp_path: Path) -> None:
    data = model("bpe-bytes-prefix")
    last = processor(data).vocab_size()
    token = {"content": "<|end|>", "rstrip": True, "special": True}
    config = {"added_tokens_decoder": {str(last + 3): token}, "legacy": False}
    tokenizer = load(tmp_path, data, config)
    assert tokenizer.vocab_size == last + 4
    assert tokenizer.encode("the<|end|> \n fox", False) == [
        *processor(data).encode("the"),
        last + 3,
        *processor(data, add_dummy_prefix=False).encode("fox"),
    ]
    assert tokenizer.decode([last + 1]) == "\ufffd"


def test_files_of_older_checkpoints(tmp_path: Path) -> None:
    data = model("bpe-bytes-prefix")
    last = processor(data).vocab_size()
    (tmp_path / "added_tokens.json").write_text(json.dumps({"<|user|>": last, "<note>": last + 1}))
    names = {"eos_token": {"content": "<|user|>", "lstrip": False}, "pad_token": "[PAD]"}
    (tmp_path / "special_tokens_map.json").write_text(json.dumps(names))
    tokenizer = load(tmp_path, data)
    assert tokenizer.eos_token_id == last
    assert tokenizer.vocab_size == last + 2
    assert tokenizer.decode([last, last + 1]) == "<note>"


# --- the checkpoint's own code -------------------------------------------------------------------


def plant_code(directory: Path) -> Path:
    """Code in ``directory`` that a loader which trusts it would run; the file it would leave."""
    trace = directory / "it-ran"
    source = f"open({str(trace)!r}, 'w').close()\nclass OwnTokenizer: pass\n"
    (directory / "tokenization_own.py").write_text(source)
    return trace


def own_class(**config: Any) -> dict[str, Any]:
    names = ["tokenization_own.OwnTokenizer", "tokenization_own.OwnTokenizer"]
    return {"auto_map": {"AutoTokenizer": names}, **config}


def assert_not_run(trace: Path) -> None:
    assert not trace.exists()
    assert not [name for name in sys.modules if "tokenization_own" in name]


def test_code_beside_tokenizer_json_is_not_run(tmp_path: Path) -> None:
    data = model("bpe-bytes-prefix")
    config = {"chat_template": "T {{ bos_token }}", "add_bos_token": True}
    expected = load(tmp_path, data, config)
    fast = LlamaTokenizer.from_pretrained(str(tmp_path))
    fast.save_pretrained(str(tmp_path))
    for name in ("OwnTokenizer", "LlamaTokenizer"):
        trace = plant_code(tmp_path)
        own = own_class(tokenizer_class=name, eos_token="</s>", bos_token="<s>", **config)
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(own))
        tokenizer = load_tokenizer(str(tmp_path), str(tmp_path), None)
        assert tokenizer.encode("the fox") == expected.encode("the fox")
        assert tokenizer.eos_token_id == 2
        assert tokenizer.render_chat([{"role": "user", "content": "x"}]) == "T <s>"
        assert_not_run(trace)


def test_code_beside_tokenizer_model_is_not_run(tmp_path: Path) -> None:
    trace = plant_code(tmp_path)
    known = own_class(tokenizer_class="LlamaTokenizer")
    assert load(tmp_path, model("bpe-bytes-prefix"), known).encode("")[:1] == [1]
    assert_not_run(trace)
    reason = refusal(tmp_path, model("bpe-bytes-prefix"), own_class(tokenizer_class="OwnTokenizer"))
    assert "OwnTokenizer" in reason
    assert_not_run(trace)


def test_code_of_a_directory_with_neither_is_not_run(tmp_path: Path) -> None:
    trace = plant_code(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"auto_map": {"AutoConfig": "a.B"}}))
    (tmp_path / "vocab.json").write_text("{}")
    assert "never run" in refusal(tmp_path, None, own_class(tokenizer_class="OwnTokenizer"))
    assert_not_run(trace)


def test_an_unknown_class_with_tokenizer_json(tmp_path: Path) -> None:
    expected = load(tmp_path, model("bpe-bytes-prefix"))
    LlamaTokenizer.from_pretrained(str(tmp_path)).save_pretrained(str(tmp_path))
    config = {"tokenizer_class": "NobodysTokenizer", "eos_token": "</s>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    tokenizer = load_tokenizer(str(tmp_path), str(tmp_path), None)
    assert tokenizer.encode("how are you?", False) == expected.encode("how are you?", False)


# --- errors --------------------------------------------------------------------------------------


def refusal(directory: Path, data: bytes | None, config: Mapping[str, Any]) -> str:
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    if data is not None:
        (directory / "tokenizer.model").write_bytes(data)
    with pytest.raises(ValueError, match=re.escape(str(directory))) as caught:
        load_tokenizer(str(directory), str(directory), None)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("data", [b"", b"IQ== 0\nIg== 1\n", bytes(range(256)), b"\n\x03a"])
def test_a_broken_file_is_refused(data: bytes, tmp_path: Path) -> None:
    assert "tokenizer.model" in refusal(tmp_path, data, {})
    half = model("bpe-bytes-prefix")
    assert "tokenizer.model" in refusal(tmp_path, half[: len(half) // 2], {})


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        ({"tokenizer_class": "NobodysTokenizer"}, "NobodysTokenizer"),
        ({"added_tokens_decoder": {"7": {"content": "<s>"}}}, "'<s>' has id 7, but 1"),
        ({"eos_token": "<|nowhere|>"}, "'<|nowhere|>' is not in the vocabulary"),
        ({"additional_special_tokens": ["<x>"]}, "'<x>' is not in the vocabulary"),
        ({"eos_token": 2}, "eos_token: 2 is no token"),
        ({"legacy": "yes"}, "legacy is 'yes', not a bool"),
        ({"sp_model_kwargs": {"enable_sampling": True}}, "sp_model_kwargs"),
        ({"chat_template": [1]}, "chat_template is neither"),
    ],
)
def test_a_configuration_that_cannot_be_honoured_is_refused(
    config: dict[str, Any], reason: str, tmp_path: Path
) -> None:
    assert reason in refusal(tmp_path, model("bpe-bytes-prefix"), config)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"model_type": "char", "vocab_size": 60}, "words or characters"),
        ({"treat_whitespace_as_suffix": True}, "spaces behind"),
    ],
)
def test_a_model_that_cannot_be_honoured_is_refused(
    options: dict[str, Any], reason: str, tmp_path: Path
) -> None:
    data = train(**({"byte_fallback": False, "vocab_size": 150} | options))
    assert reason in refusal(tmp_path, data, {})


def test_a_hole_in_a_unigram_vocabulary_is_refused(tmp_path: Path) -> None:
    data = model("unigram-bytes")
    last = processor(data).vocab_size()
    config = {"added_tokens_decoder": {str(last + 1): {"content": "<x>"}}}
    assert f"no token with id {last}" in refusal(tmp_path, data, config)
