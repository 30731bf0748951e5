"""Chat templates: the model's own, one given by option, and their errors."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer as FastTokenizer
from tokenizers import decoders, models
from transformers import PreTrainedTokenizerFast

from serve.tokenizer.tokenizer import Tokenizer, load_tokenizer
from tests.support.sentencepiece_models import model
from tests.tokenizer.test_tokenizer import smollm2


def test_chat_template_of_the_model() -> None:
    text = smollm2().render_chat(
        [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
    )
    assert text == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n"
        "<|im_start|>assistant\n"
    )
    closed = smollm2().render_chat([{"role": "user", "content": "Hi"}], add_generation_prompt=False)
    assert closed.endswith("Hi<|im_end|>\n")


def _fast() -> FastTokenizer:
    fast = FastTokenizer(models.BPE({"a": 0}, []))
    fast.decoder = decoders.ByteLevel()
    return fast


def _with_template(
    tmp_path: Path, template: str | None, model_path: Path | None = None
) -> Tokenizer:
    PreTrainedTokenizerFast(tokenizer_object=_fast()).save_pretrained(str(tmp_path))
    return load_tokenizer(str(tmp_path), str(model_path or tmp_path), template)


def test_a_given_template_overrides_and_sees_its_variables(tmp_path: Path) -> None:
    tokenizer = _with_template(tmp_path, "{{ messages[0].content }}-{{ mood }}")
    assert tokenizer.render_chat([{"role": "user", "content": "x"}], mood="good") == "x-good"


def test_the_template_of_the_models_directory_serves_a_bare_tokenizer(tmp_path: Path) -> None:
    other, bare = tmp_path / "model", tmp_path / "bare"
    other.mkdir()
    (other / "chat_template.jinja").write_text("T {{ messages[0].content }}")
    tokenizer = _with_template(bare, None, other)
    assert tokenizer.render_chat([{"role": "user", "content": "x"}]) == "T x"


TOKENIZERS = ("tokenizer.json", "tokenizer.model")


def _write_tokenizer(directory: Path, file: str, template: Any, jinja: str | None) -> None:
    """Make a tokenizer with ``template`` in its configuration and ``jinja`` in a file beside it."""
    directory.mkdir()
    config: dict[str, Any] = {"tokenizer_class": "LlamaTokenizer", "chat_template": template}
    if file == "tokenizer.json":
        _fast().save(str(directory / file))
        config["tokenizer_class"] = "PreTrainedTokenizerFast"
    else:
        (directory / file).write_bytes(model("bpe-bytes"))
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    if jinja is not None:
        (directory / "chat_template.jinja").write_text(jinja)


@pytest.mark.parametrize("file", TOKENIZERS)
@pytest.mark.parametrize("jinja", ["beside", None])
@pytest.mark.parametrize("template", ["configured", "named", None])
@pytest.mark.parametrize("of_model", ["of the model", None])
def test_the_nearest_template_is_taken(
    tmp_path: Path, file: str, jinja: str | None, template: str | None, of_model: str | None
) -> None:
    configured: Any = template
    if template == "named":
        configured = [{"name": name, "template": f"named {name}"} for name in ("rag", "default")]
    _write_tokenizer(tmp_path / "tokenizer", file, configured, jinja)
    (tmp_path / "model").mkdir()
    if of_model:
        (tmp_path / "model" / "chat_template.jinja").write_text(of_model)
    tokenizer = load_tokenizer(str(tmp_path / "tokenizer"), str(tmp_path / "model"), None)
    expected = jinja or ("named default" if template == "named" else template) or of_model
    assert tokenizer.has_chat_template == (expected is not None)
    if expected is not None:
        assert tokenizer.render_chat([{"role": "user", "content": "x"}]) == expected


@pytest.mark.parametrize("file", TOKENIZERS)
def test_named_templates_without_a_default_leave_the_choice(
    tmp_path: Path, file: str, caplog: pytest.LogCaptureFixture
) -> None:
    named = [{"name": name, "template": name} for name in ("tool_use", "rag")]
    path = tmp_path / "tokenizer"
    _write_tokenizer(path, file, named, None)
    assert not load_tokenizer(str(path), str(path), None).has_chat_template
    (record,) = caplog.records
    assert record.levelname == "WARNING"
    assert "rag, tool_use" in record.message
    assert "--chat-template" in record.message
    caplog.clear()
    given = load_tokenizer(str(path), str(path), "given {{ messages[0].content }}")
    assert given.render_chat([{"role": "user", "content": "x"}]) == "given x"
    (tmp_path / "chat_template.jinja").write_text("of the model")
    assert load_tokenizer(str(path), str(tmp_path), None).has_chat_template
    assert not caplog.records


def test_without_a_template_there_is_no_chat(tmp_path: Path) -> None:
    tokenizer = _with_template(tmp_path, None)
    assert not tokenizer.has_chat_template
    with pytest.raises(ValueError, match="no chat template"):
        tokenizer.render_chat([{"role": "user", "content": "x"}])


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("{{ raise_exception('roles must alternate') }}", "^roles must alternate$"),
        ("{{ messages[0].content + 1 }}", "str"),
        ("{{ messages[9].content.x }}", "no element"),
        ("{{ ''.__class__.__mro__ }}", "unsafe"),
    ],
)
def test_an_error_raised_by_a_template_is_a_value_error(
    tmp_path: Path, template: str, reason: str
) -> None:
    tokenizer = _with_template(tmp_path, template)
    with pytest.raises(ValueError, match=reason):
        tokenizer.render_chat([{"role": "user", "content": "x"}])


def test_template_variables_cannot_replace_our_arguments() -> None:
    for name in ("chat_template", "tokenize"):
        with pytest.raises(ValueError, match=name):
            smollm2().render_chat([{"role": "user", "content": "x"}], True, **{name: "y"})


def test_a_template_that_does_not_compile_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="chat template, line 2"):
        _with_template(tmp_path, "fine\n{% if %}")
