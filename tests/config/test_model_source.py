"""The server's options for the model: finding its files, and errors in them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from huggingface_hub.utils import filter_repo_objects

from serve.config.sampling_defaults import SamplingDefaults
from serve.config.server import ConfigError, parse_args
from tests.support.config_cases import model, parse, refusal

__all__ = ["model"]


# --- model --------------------------------------------------------------------------------------


def test_load_format_is_found(model: Path) -> None:
    (model / "pytorch_model.bin").touch()
    assert parse(model).load_format == "safetensors"
    assert parse(model, "--load-format pt").load_format == "pt"
    (model / "model.safetensors").unlink()
    assert parse(model).load_format == "pt"
    (model / "pytorch_model.bin").rename(model / "pytorch_model.bin.index.json")
    assert parse(model).load_format == "pt"
    (model / "pytorch_model.bin.index.json").unlink()
    assert "holds no safetensors or pytorch_model.bin weights" in refusal(model, "")
    assert parse(model, "--load-format dummy").load_format == "dummy"


def test_gguf_file(tmp_path: Path) -> None:
    built_in = Path(parse_args([], 1).model)
    copy = tmp_path / "my-model.Q4_1.gguf"
    copy.symlink_to(built_in)
    config = parse(copy)
    assert config.load_format == "gguf"
    assert config.model == config.tokenizer == str(copy)
    assert config.served_model_names == ("my-model.Q4_1",)
    assert parse(copy, "--load-format dummy").load_format == "dummy"
    assert "--load-format pt does not fit" in refusal(copy, "--load-format pt")


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("absent/deep/er", "does not exist"),
        ("absent.gguf", "does not exist"),
        ("weights.bin", "neither a directory nor a .gguf file"),
        ("empty", "has no config.json"),
        ("only-gguf", "give the file itself, such as m.gguf"),
    ],
)
def test_model_refused(tmp_path: Path, name: str, part: str) -> None:
    (tmp_path / "weights.bin").touch()
    (tmp_path / "empty").mkdir()
    (tmp_path / "only-gguf").mkdir()
    (tmp_path / "only-gguf" / "m.gguf").touch()
    assert part in refusal(tmp_path / name, "")


def test_bad_configurations(model: Path) -> None:
    (model / "config.json").write_text("{")
    assert "config.json" in refusal(model, "")
    (model / "config.json").write_text('{"architectures": ["Whatever"], "model_type": "whatever"}')
    assert "Whatever" in refusal(model, "")


def test_generation_config(model: Path) -> None:
    """The model's recommendations are the defaults; other values are the OpenAI API's."""
    assert parse(model).sampling_defaults == SamplingDefaults()
    file = model / "generation_config.json"
    given = {"do_sample": True, "temperature": 0.7, "top_k": 20, "min_p": None, "eos_token_id": [2]}
    file.write_text(json.dumps(given))
    config = parse(model)
    assert config.sampling_defaults == SamplingDefaults(temperature=0.7, top_k=20)
    assert any("temperature 0.7, top_k 20" in note for note in config.notes)
    assert config.model_config.eos_token_ids == (2, 1)
    assert config.warnings == ()
    config = parse(model, "--generation-config none")
    assert config.sampling_defaults == SamplingDefaults()
    assert config.model_config.eos_token_ids == (2, 1)
    file.write_text(json.dumps({"temperature": 0.0, "top_k": -1}))
    assert parse(model).sampling_defaults == SamplingDefaults(temperature=0.0)


def test_whole_numbers_may_be_written_as_floats(model: Path) -> None:
    advice = {"top_k": 50.0, "max_new_tokens": 512.0, "temperature": 1, "eos_token_id": [2.0, 3]}
    (model / "generation_config.json").write_text(json.dumps(advice))
    config = parse(model)
    assert config.sampling_defaults == SamplingDefaults(top_k=50, max_tokens=512)
    assert type(config.sampling_defaults.top_k) is type(config.sampling_defaults.max_tokens) is int
    assert config.model_config.eos_token_ids == (2, 3, 1)
    assert "default sampling parameters: top_k 50, max_tokens 512" in config.notes[-1]
    assert config.warnings == ()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", 2.5), ("temperature", "hot"), ("top_p", 0), ("top_k", 1.5), ("min_p", -1),
        ("repetition_penalty", 0), ("repetition_penalty", True), ("temperature", float("nan")),
        ("top_p", 0.0), ("top_k", float("inf")), ("max_new_tokens", 0), ("max_new_tokens", "all"),
        ("eos_token_id", "</s>"), ("eos_token_id", [2, None]),
    ],
)  # fmt: skip
def test_unusable_advice_is_skipped_with_a_warning(model: Path, name: str, value: object) -> None:
    advice = {"do_sample": False, "temperature": 0.5, name: value}
    (model / "generation_config.json").write_text(json.dumps(advice))
    config = parse(model)
    [warning] = config.warnings
    assert warning.startswith(f"generation_config.json: {name} ")
    assert "\n" not in warning
    kept = 1.0 if name == "temperature" else 0.5
    assert config.sampling_defaults == SamplingDefaults(temperature=kept)
    assert config.model_config.eos_token_ids == (1,)
    assert bool(parse(model, "--generation-config none").warnings) == (name == "eos_token_id")


@pytest.mark.parametrize("content", ["", "{", "[]", '"x"', "\xff"])
def test_an_unreadable_generation_config_is_skipped_with_a_warning(
    model: Path, content: str
) -> None:
    (model / "generation_config.json").write_bytes(content.encode("latin-1"))
    config = parse(model)
    [warning] = config.warnings
    assert warning.startswith("generation_config.json ")
    assert config.sampling_defaults == SamplingDefaults()
    assert config.model_config.eos_token_ids == (1,)


@pytest.mark.parametrize("stem", ["model-{}.safetensors", "pytorch_model-{}.bin"])
def test_shards_without_an_index(model: Path, stem: str) -> None:
    (model / "model.safetensors").unlink()
    for part in ("00001-of-00003", "00002-of-00003", "00003-of-00003"):
        (model / stem.format(part)).touch()
    expected = "safetensors" if stem.startswith("model") else "pt"
    assert parse(model).load_format == expected
    (model / stem.format("00002-of-00003")).unlink()
    message = refusal(model, "")
    assert f"lacks shards of its weights: {stem.format('00002-of-00003')}" in message
    assert "00001" not in message
    (model / stem.format("00001-of-00002")).touch()
    assert "holds shards of more than one checkpoint" in refusal(model, "")
    (model / (stem.format("x")[:-2].split("-")[0] + Path(stem).suffix)).touch()
    assert parse(model).load_format == expected  # the single file takes precedence


def test_missing_tokenizer(model: Path) -> None:
    (model / "tokenizer.json").rename(model.parent / "tokenizer.json")
    assert "--tokenizer none" in refusal(model, "")
    assert parse(model, "--tokenizer none").tokenizer is None
    assert parse(model, f"--tokenizer {model.parent}").tokenizer == str(model.parent)


def test_chat_template_file(model: Path) -> None:
    file = model / "template.jinja"
    file.write_text("{% for m in messages %}{{ m.content }}{% endfor %}")
    assert parse(model, f"--chat-template {file}").chat_template == file.read_text()
    file.write_text(" \n")
    assert "is empty" in refusal(model, f"--chat-template {file}")
    file.write_bytes(b"\xff\xfe\xff")
    assert "not UTF-8" in refusal(model, f"--chat-template {file}")


def test_relative_model_is_resolved(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(model)
    config = parse(Path())
    assert config.model == str(model)
    assert config.served_model_names == ("tiny-llama",)


def test_hub_id_is_downloaded(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, list[str]]] = []

    def snapshot_download(
        repo: str, *, allow_patterns: list[str], ignore_patterns: list[str]
    ) -> str:
        asked.append((repo, allow_patterns))
        return str(model)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    config = parse_args(["--model", "someone/tiny-llama"], 2)
    assert config.model == str(model)
    assert config.served_model_names == ("someone/tiny-llama",)
    parse_args(["--model", "someone/tiny-llama", "--load-format", "dummy"], 2)
    assert asked[0][0] == "someone/tiny-llama"
    assert "model*.safetensors" in asked[0][1]
    assert not any("safetensors" in pattern for pattern in asked[1][1])
    assert not any("bin" in pattern for _, patterns in asked for pattern in patterns)


@pytest.mark.parametrize("stored", ["pytorch_model.bin", "pytorch_model-00001-of-00001.bin"])
@pytest.mark.parametrize("asked", ["auto", "safetensors", "pt", "dummy"])
def test_hub_weights_of_one_kind_are_downloaded(
    model: Path, tmp_path: Path, asked: str, stored: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A repository without safetensors gives its .bin files, unless the format is another."""
    hub, here = model, tmp_path / "here"
    here.mkdir()
    (hub / "model.safetensors").unlink()
    (hub / stored).touch()
    if stored != "pytorch_model.bin":
        (hub / "pytorch_model.bin.index.json").touch()
    calls: list[list[str]] = []

    def snapshot_download(
        repo: str, *, allow_patterns: list[str], ignore_patterns: list[str]
    ) -> str:
        calls.append(allow_patterns)
        names = [file.name for file in hub.iterdir()]
        for name in filter_repo_objects(
            names, allow_patterns=allow_patterns, ignore_patterns=ignore_patterns
        ):
            shutil.copy(hub / name, here / name)
        return str(here)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    arguments = ["--model", "someone/tiny-llama", "--load-format", asked]
    if asked == "safetensors":
        with pytest.raises(ConfigError, match="holds no safetensors weights"):
            parse_args(arguments, 2)
    else:
        assert parse_args(arguments, 2).load_format == ("dummy" if asked == "dummy" else "pt")
    assert (here / stored).exists() == (asked in ("auto", "pt"))
    assert len(calls) == (2 if asked == "auto" else 1)


def test_hub_out_of_reach() -> None:
    with pytest.raises(ConfigError) as caught:
        parse_args(["--model", "someone/no-such-model"], 2)
    start = "--model: someone/no-such-model is not a path on this machine and cannot"
    assert str(caught.value).startswith(start)
