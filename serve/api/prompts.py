"""Prompts as token ids: text tokenised, ids checked, lengths held against the context.

Functions named ``*_now`` take time that grows with the body: ``Body.work`` calls them.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from serve.api.body import Body
from serve.api.errors import ApiError
from serve.api.settings import Api
from serve.tokenizer.tokenizer import Tokenizer

_SLICE = 4096  # ids that are looked at in one go: other threads have their turn in between

_RESERVED = {"messages", "conversation", "tokenize", "chat_template"}  # of the template's options


def need_tokenizer(api: Api, what: str) -> Tokenizer:
    """The tokenizer; 400 if the server runs without one."""
    if api.tokenizer is None:
        raise ApiError(f"{what} needs a tokenizer, and the server runs without one; send token ids")
    return api.tokenizer


def encode_now(tokenizer: Tokenizer, text: str, add_special_tokens: bool) -> list[int]:
    """Token ids of ``text``; 400 if it is no valid Unicode."""
    try:
        return tokenizer.encode(text, add_special_tokens)
    except ValueError as error:
        raise ApiError(str(error), param="prompt") from None


def read_prompts_now(body: Body, api: Api, max_prompts: int) -> list[tuple[int, ...]]:
    """``prompt``: a string, strings, token ids, or lists of token ids; at most ``max_prompts``."""
    special = body.boolean("add_special_tokens", True)
    values = _listed(body.get("prompt"))
    if len(values) > max_prompts:
        raise ApiError(
            f"{len(values)} prompts ask for too many choices at once: at most {max_prompts} "
            "prompts may have this n",
            param="prompt",
        )
    prompts = []
    for value in values:
        if isinstance(value, str):
            value = encode_now(need_tokenizer(api, "a prompt as text"), value, special)
        prompts.append(_check_prompt(value, api, "prompt"))
    return prompts


def read_messages_now(body: Body, api: Api) -> tuple[int, ...]:
    """``messages`` through the chat template."""
    token_ids = render_messages_now(body, api)
    return _check_prompt(token_ids, api, "messages")


def render_messages_now(body: Body, api: Api) -> list[int]:
    """``messages`` through the chat template, however long."""
    tokenizer = need_tokenizer(api, "chat")
    if not tokenizer.has_chat_template:
        raise ApiError("the model has no chat template; start the server with --chat-template")
    messages = [_message(message) for message in _message_list(body.get("messages"))]
    options = body.mapping("chat_template_kwargs")
    generate = body.boolean("add_generation_prompt", True)
    special = body.boolean("add_special_tokens", False)
    if reserved := options.keys() & _RESERVED:
        raise ApiError(
            f"chat_template_kwargs must not have {min(reserved)}", param="chat_template_kwargs"
        )
    try:
        text = tokenizer.render_chat(messages, add_generation_prompt=generate, **options)
    except (ValueError, TypeError) as error:
        raise ApiError(f"the chat template refuses: {error}", param="messages") from None
    return encode_now(tokenizer, text, special)


def are_token_ids_now(value: Any, num_ids: int) -> bool:
    """Whether ``value`` is a list of integers in ``range(num_ids)``."""
    return isinstance(value, list) and all(
        set(map(type, part)) == {int} and min(part) >= 0 and max(part) < num_ids
        for part in _slices(value)
    )


def _slices(values: list[Any]) -> Iterator[list[Any]]:
    return (values[start : start + _SLICE] for start in range(0, len(values), _SLICE))


def _listed(value: Any) -> list[Any]:
    """One prompt or several, as a list."""
    if value is None:
        raise ApiError("prompt is required", param="prompt")
    if isinstance(value, str):
        return [value]
    if not isinstance(value, list) or not value:
        raise ApiError("prompt must be a string or a list, and not empty", param="prompt")
    kinds = {kind for part in _slices(value) for kind in set(map(type, part))}
    if kinds == {int}:
        return [value]
    if kinds in ({str}, {list}):
        return value
    raise ApiError("prompt must hold strings, token ids or lists of token ids", param="prompt")


def _check_prompt(token_ids: list[Any], api: Api, param: str) -> tuple[int, ...]:
    """400 for what is no prompt, has no token, or leaves no room for an answer."""
    if not token_ids:
        raise ApiError("the prompt must not be empty", param=param)
    longest = api.service.max_model_len
    if len(token_ids) >= longest:
        raise ApiError(
            f"This model's maximum context length is {longest} tokens. However, your prompt "
            f"contains {len(token_ids)} input tokens and one more is needed for the answer.",
            param=param,
        )
    if not are_token_ids_now(token_ids, api.settings.vocab_size):
        raise _bad_id(token_ids, api.settings.vocab_size, param)
    return tuple(token_ids)


def _bad_id(token_ids: list[Any], vocab_size: int, param: str) -> ApiError:
    """What is wrong with the first of ``token_ids`` that is none; tokenizers too can have more."""
    bad = next(i for i in token_ids if type(i) is not int or not 0 <= i < vocab_size)
    if type(bad) is not int:
        return ApiError("a prompt of token ids must hold integers only", param=param)
    return ApiError(
        f"token id {bad} is out of vocabulary, which has {vocab_size} tokens", param=param
    )


def _message_list(value: Any) -> list[Any]:
    if not isinstance(value, list) or not value:
        raise ApiError("messages must be a list with at least one message", param="messages")
    return value


def _message(message: Any) -> dict[str, Any]:
    """One message with its content as text, as templates expect it."""
    if not isinstance(message, dict) or not isinstance(message.get("role"), str):
        raise ApiError("each message must be an object with a role", param="messages")
    if message.get("tool_calls"):
        raise ApiError("tool_calls are not supported by this server", param="messages")
    role = "system" if message["role"] == "developer" else message["role"]
    return {"role": role, "content": _content(message.get("content"))}


def _content(content: Any) -> str:
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise ApiError("content must be a string or a list of parts", param="messages")
    for part in content:
        if not isinstance(part, dict) or part.get("type") != "text":
            raise ApiError("content may only have parts of type text", param="messages")
        if not isinstance(part.get("text"), str):
            raise ApiError("a text part must have a text", param="messages")
    return "\n".join(part["text"] for part in content)
