"""TokenizerConfig: the contents of tokenizer_config.json and of the two older files beside it.

Checkpoints from before 2023 keep their special tokens in ``special_tokens_map.json`` and the ids of
added tokens in ``added_tokens.json``. A value in ``tokenizer_config.json`` takes precedence.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from serve.model_config.json_file import read_json_if_any

T = TypeVar("T")

NAMED_TOKENS = ("bos_token", "eos_token", "unk_token", "pad_token")


@dataclass(frozen=True, slots=True)
class AddedToken:
    """A token that is found in the raw text before the vocabulary's model splits the rest.

    ``lstrip`` and ``rstrip`` include the whitespace on that side in the match. ``single_word``
    matches only between word boundaries.
    """

    content: str
    special: bool
    lstrip: bool = False
    rstrip: bool = False
    single_word: bool = False


@dataclass(frozen=True, slots=True)
class TokenizerConfig:
    """The settings of one tokenizer.

    ``named`` has those keys of ``NAMED_TOKENS`` that are in the files; its value is None for a
    null. ``added`` is by token id. ``extra_special`` are special tokens that are given without an
    id. ``prefix_space`` says whether a space is put before the text; None leaves it to the
    vocabulary. ``legacy`` puts that space before every stretch of text between special tokens, not
    only before the first.
    """

    tokenizer_class: str | None
    remote_class: str | None
    named: Mapping[str, str | None]
    added: Mapping[int, AddedToken]
    extra_special: tuple[str, ...]
    add_bos: bool
    add_eos: bool
    prefix_space: bool | None
    legacy: bool
    chat_template: str | dict[str, str] | None


def read_tokenizer_config(directory: Path) -> TokenizerConfig:
    """Read the configuration in ``directory``. A missing file counts as empty.

    The defaults are those of transformers' LlamaTokenizer before it had these keys: add bos but not
    eos, legacy. Raises ``ValueError`` for a malformed or unsupported value.
    """
    own = read_json_if_any(directory / "tokenizer_config.json")
    merged = read_json_if_any(directory / "special_tokens_map.json") | own
    if merged.get("sp_model_kwargs"):
        raise ValueError(f"sp_model_kwargs {merged['sp_model_kwargs']} are not supported")
    named = {key: _optional_token(key, merged[key]) for key in NAMED_TOKENS if key in merged}
    extra = _extra_special(merged)
    special = {*named.values(), *extra}
    added = _read_added(merged, read_json_if_any(directory / "added_tokens.json"))
    # added_tokens.json does not mark special tokens, so named and extra tokens count as special.
    return TokenizerConfig(
        tokenizer_class=_optional(merged, "tokenizer_class", str),
        remote_class=_remote_class(merged.get("auto_map")),
        named=named,
        added={i: replace(t, special=t.special or t.content in special) for i, t in added.items()},
        extra_special=extra,
        add_bos=_flag(merged, "add_bos_token", True),
        add_eos=_flag(merged, "add_eos_token", False),
        prefix_space=_optional(merged, "add_prefix_space", bool),
        legacy=_flag(merged, "legacy", True),
        chat_template=_template(merged.get("chat_template")),
    )


def find_remote_class(directory: Path) -> str | None:
    """Return the tokenizer class that the checkpoint in ``directory`` brings as code, if any."""
    return _remote_class(read_json_if_any(directory / "tokenizer_config.json").get("auto_map"))


def _optional(merged: Mapping[str, Any], key: str, kind: type[T]) -> T | None:
    value = merged.get(key)
    if value is None or isinstance(value, kind):
        return value
    raise ValueError(f"{key} is {value!r}, not a {kind.__name__}")


def _flag(merged: Mapping[str, Any], key: str, default: bool) -> bool:
    value = _optional(merged, key, bool)
    return default if value is None else value


def _token(key: str, value: Any) -> str:
    """Return the text of a token. The files give the text, or an object with it in ``content``."""
    content = value.get("content") if isinstance(value, dict) else value
    if not isinstance(content, str) or not content:
        raise ValueError(f"{key}: {value!r} is not a token")
    return content


def _optional_token(key: str, value: Any) -> str | None:
    return None if value is None else _token(key, value)


def _extra_special(merged: Mapping[str, Any]) -> tuple[str, ...]:
    """Merge the lists under the old and the new key. The new one may map names to tokens."""
    found: list[str] = []
    for key in ("additional_special_tokens", "extra_special_tokens"):
        value = merged.get(key) or []
        found += [_token(key, t) for t in (value.values() if isinstance(value, dict) else value)]
    return tuple(dict.fromkeys(found))


def _read_added(merged: Mapping[str, Any], old: Mapping[str, Any]) -> dict[int, AddedToken]:
    """Return the added tokens by id, from ``added_tokens_decoder`` or else the older file."""
    decoder = merged.get("added_tokens_decoder")
    if decoder is None:
        return {int(i): AddedToken(_token("added_tokens.json", t), False) for t, i in old.items()}
    if not isinstance(decoder, dict):
        raise ValueError("added_tokens_decoder is not a JSON object")
    found = {}
    for key, value in decoder.items():
        content = _token("added_tokens_decoder", value)
        fields = value if isinstance(value, dict) else {}
        found[int(key)] = AddedToken(
            content,
            special=_flag(fields, "special", False),
            lstrip=_flag(fields, "lstrip", False),
            rstrip=_flag(fields, "rstrip", False),
            single_word=_flag(fields, "single_word", False),
        )
    return found


def _remote_class(auto_map: Any) -> str | None:
    """Return the class name of the checkpoint's own code, for error texts: it is never loaded."""
    names = auto_map.get("AutoTokenizer") if isinstance(auto_map, dict) else auto_map
    if isinstance(names, list | tuple):  # the slow class and the fast one, either may be null
        names = next((name for name in reversed(names) if name), None)
    return str(names) if names else None


def _template(value: Any) -> str | dict[str, str] | None:
    """Return a chat template, or several by name."""
    if value is None or isinstance(value, str):
        return value
    try:
        return {str(entry["name"]): str(entry["template"]) for entry in value}
    except (TypeError, KeyError) as error:
        raise ValueError("chat_template is neither a text nor a list of named templates") from error
