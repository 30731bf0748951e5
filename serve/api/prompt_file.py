"""Read the prompts of the offline command line: a JSONL file, checked line by line.

Its lines have the sampling fields of the HTTP API. Unlike HTTP, unknown fields are refused,
because a misspelt one would silently change a whole batch.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import msgspec
from msgspec import Meta

from serve.api.sampling_params import make_sampling_params
from serve.api.schemas import SamplingFields, Temperature, TokenId
from serve.api.validation import InvalidField, to_struct
from serve.config.sampling_defaults import SamplingDefaults
from serve.request import SamplingParams

DEFAULT_MAX_TOKENS = 16  # of lines without a limit, if the model recommends none


class PromptFileError(ValueError):
    """The file cannot be used; the text is one line that names the file and the line."""


class PromptLine(SamplingFields, frozen=True, kw_only=True):
    """The fields of one line: a prompt, and parameters that are greedy by default."""

    prompt: Annotated[
        str | Annotated[list[TokenId], Meta(min_length=1)],
        Meta(description="a string or a list of at least one token id"),
    ]
    temperature: Temperature | None = 0.0


@dataclass(frozen=True, slots=True)
class FilePrompt:
    """A line of a prompt file, and where it stands, as ``prompts.jsonl:3``."""

    place: str
    line: PromptLine

    def sampling_params(
        self, defaults: SamplingDefaults, *, vocab_size: int, has_tokenizer: bool
    ) -> SamplingParams:
        """Return the line's parameters. ``PromptFileError`` if the model cannot serve the line."""
        prompt = self.line.prompt
        if isinstance(prompt, str) and not has_tokenizer:
            raise PromptFileError(f"{self.place}: prompt must be token ids without a tokenizer")
        if isinstance(prompt, list) and max(prompt) >= vocab_size:
            raise PromptFileError(f"{self.place}: prompt must have token ids below {vocab_size}")
        try:
            return make_sampling_params(
                self.line, defaults, max_tokens=DEFAULT_MAX_TOKENS, vocab_size=vocab_size,
                has_tokenizer=has_tokenizer,
            )  # fmt: skip
        except InvalidField as error:
            raise PromptFileError(f"{self.place}: {error}") from None


def read_prompt_file(path: Path) -> list[FilePrompt]:
    """Read all lines but the blank ones. Raises ``PromptFileError`` for the first invalid one."""
    try:
        lines = path.read_bytes().splitlines()
    except OSError as error:
        raise PromptFileError(f"{path}: {error.strerror}") from None
    return [
        _read_line(f"{path}:{number}", line) for number, line in enumerate(lines, 1) if line.strip()
    ]


def _read_line(place: str, line: bytes) -> FilePrompt:
    try:
        fields: Any = msgspec.json.decode(line)
    except (msgspec.DecodeError, ValueError, RecursionError) as error:
        raise PromptFileError(f"{place}: not valid JSON: {error}") from None
    if not isinstance(fields, dict):
        raise PromptFileError(f"{place}: the line must be a JSON object")
    for name in fields:
        if name not in PromptLine.__struct_fields__:
            raise PromptFileError(f"{place}: unknown field {name[:40]!r}")
    try:
        return FilePrompt(place, to_struct(fields, PromptLine))
    except InvalidField as error:
        raise PromptFileError(f"{place}: {error}") from None
