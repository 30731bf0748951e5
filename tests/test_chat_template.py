"""Chat templates: the model's own, given ones, and what they refuse."""

from __future__ import annotations

from pathlib import Path

import pytest
from tokenizers import Tokenizer as FastTokenizer
from tokenizers import decoders, models
from transformers import PreTrainedTokenizerFast

from serve.tokenizer import Tokenizer, load_tokenizer
from tests.test_tokenizer import smollm2


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


def _with_template(
    tmp_path: Path, template: str | None, model_path: Path | None = None
) -> Tokenizer:
    fast = FastTokenizer(models.BPE({"a": 0}, []))
    fast.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=fast).save_pretrained(str(tmp_path))
    return load_tokenizer(str(tmp_path), str(model_path or tmp_path), template)


def test_a_given_template_overrides_and_sees_its_variables(tmp_path: Path) -> None:
    tokenizer = _with_template(tmp_path, "{{ messages[0].content }}-{{ mood }}")
    assert tokenizer.render_chat([{"role": "user", "content": "x"}], mood="good") == "x-good"


def test_the_template_of_the_models_directory_serves_a_bare_tokenizer(tmp_path: Path) -> None:
    model, bare = tmp_path / "model", tmp_path / "bare"
    model.mkdir()
    (model / "chat_template.jinja").write_text("T {{ messages[0].content }}")
    tokenizer = _with_template(bare, None, model)
    assert tokenizer.render_chat([{"role": "user", "content": "x"}]) == "T x"


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
def test_what_a_template_refuses_is_a_value_error(
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
