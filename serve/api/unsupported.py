"""Fields of OpenAI's, vLLM's and SGLang's APIs that are not served: refused unless unused."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from serve.api.validation import InvalidField


def _is_off(value: Any) -> bool:
    return value is False or value == [] or value == {}


def _is_empty(value: Any) -> bool:
    return value == "" or _is_off(value)


def _is_plain_text(value: Any) -> bool:
    return isinstance(value, dict) and value.get("type", "text") == "text"


def _never(value: Any) -> bool:
    return False


# By field: whether a value other than null leaves the feature unused. Such values are accepted,
# because clients send them by default.
_IS_UNUSED: dict[str, Callable[[Any], bool]] = {
    "echo": _is_off,
    "logprobs": lambda value: value is False,
    "top_logprobs": lambda value: value == 0,
    "prompt_logprobs": _never,
    "tools": _is_off,
    "tool_choice": lambda value: value in ("none", "auto"),
    "functions": _is_off,
    "function_call": lambda value: value in ("none", "auto"),
    "response_format": _is_plain_text,
    "suffix": lambda value: value == "",
    "use_beam_search": _is_off,
    "length_penalty": lambda value: value == 1.0,
    "audio": _never,
    "structured_outputs": _is_off,
    "guided_json": _never,
    "guided_regex": _never,
    "guided_choice": _is_off,
    "guided_grammar": _never,
    "guided_json_object": _is_off,
    "allowed_token_ids": _never,
    "bad_words": _is_off,
    "truncate_prompt_tokens": _never,
    "prompt_embeds": _never,
    "kv_transfer_params": _never,
    "continue_final_message": _is_off,
    "chat_template": _never,
    "documents": _is_off,
    "logprob_token_ids": _is_off,
    "thinking_token_budget": _never,
    "repetition_detection": _never,
    "return_tokens_as_token_ids": _is_off,
    "spaces_between_special_tokens": lambda value: value is True,
    "regex": _is_empty,
    "ebnf": _is_empty,
    "json_schema": _is_empty,
    "structural_tag": _is_empty,
    "stop_regex": _is_empty,
    "no_stop_trim": _is_off,
    "lora_path": _is_empty,
    "input_embeds": _never,
    "return_hidden_states": _is_off,
    "return_prompt_text": _is_off,
    "logits_processors": _is_off,
}


UNSUPPORTED = frozenset(_IS_UNUSED)


def refuse_unsupported(fields: Mapping[str, Any]) -> None:
    """Raise ``InvalidField`` for the first field that needs an unsupported feature."""
    for name in sorted(_IS_UNUSED.keys() & fields.keys()):
        value = fields[name]
        if value is not None and not _IS_UNUSED[name](value):
            raise InvalidField(f"{name} is not supported by this server", name)
