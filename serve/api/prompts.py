"""Turn prompts and messages into token ids, and check their lengths against the context.

The time that these functions take grows with the body. Handlers call them through
``body.work_on_body``.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from serve.api.errors import ApiError
from serve.api.schemas import (
    ChatCompletionRequest,
    ChatMessage,
    CompletionRequest,
    TextPart,
    TokenizeRequest,
)
from serve.api.settings import Api
from serve.api.validation import InvalidField, shorten, to_struct
from serve.tokenizer.tokenizer import Tokenizer

_SLICE = 4096  # ids checked at a stretch; other threads can run between two slices

# Arguments of the chat template that chat_template_kwargs must not replace.
_RESERVED = {"messages", "conversation", "tokenize", "chat_template"}


def need_tokenizer(api: Api, feature: str) -> Tokenizer:
    """Return the tokenizer; 400 if the server runs without one."""
    if api.tokenizer is None:
        raise ApiError(
            f"{feature} needs a tokenizer, and the server runs without one; send token ids"
        )
    return api.tokenizer


def encode(tokenizer: Tokenizer, text: str, add_special_tokens: bool) -> list[int]:
    """Return the token ids of ``text``; 400 if it is not valid Unicode."""
    try:
        return tokenizer.encode(text, add_special_tokens)
    except ValueError as error:
        raise ApiError(str(error), param="prompt") from None


def encode_prompt(api: Api, text: str, add_special_tokens: bool, param: str) -> list[int]:
    """Return the token ids of ``text``; 400 before it is tokenised if it cannot fit the context."""
    tokenizer = need_tokenizer(api, "a prompt as text")
    longest = api.service.max_model_len
    try:
        least = tokenizer.least_tokens(text, longest)
    except ValueError as error:
        raise ApiError(str(error), param="prompt") from None
    if least >= longest:
        raise _too_long(longest, f"at least {least}", param)
    return encode(tokenizer, text, add_special_tokens)


def read_prompts(body: CompletionRequest, api: Api, max_prompts: int) -> list[tuple[int, ...]]:
    """Return the token ids of each prompt in ``prompt``, of which there may be ``max_prompts``."""
    values = _as_list(body.prompt)
    if len(values) > max_prompts:
        raise ApiError(
            f"{len(values)} prompts need too many choices at once: at most {max_prompts} "
            "prompts are allowed with this n",
            param="prompt",
        )
    prompts = []
    for value in values:
        if isinstance(value, str):
            value = encode_prompt(api, value, body.add_special_tokens, "prompt")
        prompts.append(_check_prompt(value, api, "prompt"))
    return prompts


def read_messages(body: ChatCompletionRequest, api: Api) -> tuple[int, ...]:
    """Return the token ids of ``messages``, rendered with the chat template."""
    text = render_messages(body, api)
    token_ids = encode_prompt(api, text, body.add_special_tokens, "messages")
    return _check_prompt(token_ids, api, "messages")


def render_messages(body: ChatCompletionRequest | TokenizeRequest, api: Api) -> str:
    """Return ``messages`` in the chat template, which may be too long for the context."""
    tokenizer = need_tokenizer(api, "chat")
    if not tokenizer.has_chat_template:
        raise ApiError("the model has no chat template; start the server with --chat-template")
    options = _template_options(body.chat_template_kwargs)
    messages = _template_messages(body.messages)
    try:
        return tokenizer.render_chat(
            messages, add_generation_prompt=body.add_generation_prompt, **options
        )
    except (ValueError, TypeError) as error:
        raise ApiError(f"the chat template refuses: {error}", param="messages") from None


def are_token_ids(value: Any, num_ids: int) -> bool:
    """Return whether ``value`` is a list of integers in ``range(num_ids)``."""
    return isinstance(value, list) and all(
        set(map(type, part)) == {int} and min(part) >= 0 and max(part) < num_ids
        for part in _slices(value)
    )


def _slices(values: list[Any]) -> Iterator[list[Any]]:
    return (values[start : start + _SLICE] for start in range(0, len(values), _SLICE))


def _as_list(prompt: Any) -> list[Any]:
    """Return a list of prompts, each of which is a string or a list."""
    if isinstance(prompt, str):
        return [prompt]
    if not isinstance(prompt, list) or not prompt:
        raise ApiError("prompt must be a string or a list, and not empty", param="prompt")
    types = {kind for part in _slices(prompt) for kind in set(map(type, part))}
    if types == {int}:
        return [prompt]
    if types in ({str}, {list}):
        return prompt
    raise ApiError("prompt must hold strings, token ids or lists of token ids", param="prompt")


def _check_prompt(token_ids: list[Any], api: Api, param: str) -> tuple[int, ...]:
    """Return ``token_ids``; 400 if they are empty, not token ids, or leave no room for a token."""
    if not token_ids:
        raise ApiError("the prompt must not be empty", param=param)
    longest = api.service.max_model_len
    if len(token_ids) >= longest:
        raise _too_long(longest, str(len(token_ids)), param)
    if not are_token_ids(token_ids, api.settings.vocab_size):
        raise _invalid_id(token_ids, api.settings.vocab_size, param)
    return tuple(token_ids)


def _too_long(longest: int, count: str, param: str) -> ApiError:
    return ApiError(
        f"This model's maximum context length is {longest} tokens. However, your prompt "
        f"contains {count} input tokens and one more is needed for the answer.",
        param=param,
    )


def _invalid_id(token_ids: list[Any], vocab_size: int, param: str) -> ApiError:
    """Return the error for the first invalid id. A tokenizer, too, can have ids of its own."""
    invalid = next(i for i in token_ids if type(i) is not int or not 0 <= i < vocab_size)
    if type(invalid) is not int:
        return ApiError("a prompt of token ids must hold integers only", param=param)
    return ApiError(
        f"token id {shorten(invalid)} is out of vocabulary, which has {vocab_size} tokens",
        param=param,
    )


def _template_options(options: Any) -> dict[str, Any]:
    """Return ``chat_template_kwargs``, of which any value is allowed."""
    param = "chat_template_kwargs"
    if not isinstance(options, dict):
        raise InvalidField(f"{param} must be an object", param)
    if reserved := options.keys() & _RESERVED:
        raise InvalidField(f"{param} must not have {min(reserved)}", param)
    return options


def _template_messages(messages: Any) -> list[dict[str, Any]]:
    """Return the messages as chat templates expect them: content is text, other fields stay."""
    if not isinstance(messages, list) or not messages:
        raise ApiError("messages must be a list with at least one message", param="messages")
    return [_template_message(index, message) for index, message in enumerate(messages)]


def _template_message(index: int, value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ApiError(f"messages[{index}] must be an object with a role", param="messages")
    try:
        message = to_struct(value, ChatMessage)
    except InvalidField as error:
        raise ApiError(f"messages[{index}]: {error}", param="messages") from None
    if message.tool_calls:
        raise ApiError("tool_calls are not supported by this server", param="messages")
    role = "system" if message.role == "developer" else message.role
    # Templates take other fields, such as name, as they are. null means that there is no field.
    fields = {name: field for name, field in value.items() if field is not None}
    fields.pop("tool_calls", None)  # empty
    return fields | {"role": role, "content": _text(message.content)}


def _text(content: str | list[TextPart]) -> str:
    return content if isinstance(content, str) else "\n".join(part.text for part in content)
