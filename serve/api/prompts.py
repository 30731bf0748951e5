"""Prompts as token ids: text tokenised, ids checked, lengths held against the context."""

from __future__ import annotations

import asyncio
from typing import Any

from serve.api.body import Body, is_integer
from serve.api.errors import ApiError
from serve.api.settings import Api
from serve.tokenizer import Tokenizer

LARGE_CHARACTERS = 4096  # above this the event loop is not held up with tokenising


def need_tokenizer(api: Api, what: str) -> Tokenizer:
    """The tokenizer; 400 if the server runs without one."""
    if api.tokenizer is None:
        raise ApiError(f"{what} needs a tokenizer, and the server runs without one; send token ids")
    return api.tokenizer


async def encode(tokenizer: Tokenizer, text: str, add_special_tokens: bool) -> list[int]:
    """Token ids of ``text``; 400 if it is no valid Unicode."""
    try:
        if len(text) <= LARGE_CHARACTERS:
            return tokenizer.encode(text, add_special_tokens)
        return await asyncio.to_thread(tokenizer.encode, text, add_special_tokens)
    except ValueError as error:
        raise ApiError(str(error), param="prompt") from None


async def read_prompts(body: Body, api: Api) -> list[tuple[int, ...]]:
    """``prompt``: a string, strings, token ids, or lists of token ids."""
    value = body.get("prompt")
    special = body.boolean("add_special_tokens", True)
    prompts = []
    for prompt in _listed(value):
        if isinstance(prompt, str):
            tokenizer = need_tokenizer(api, "a prompt as text")
            prompts.append(tuple(await encode(tokenizer, prompt, special)))
        else:
            prompts.append(_check_ids(prompt, api.settings.vocab_size))
    for prompt_ids in prompts:
        check_length(prompt_ids, api)
    return prompts


async def read_messages(body: Body, api: Api) -> tuple[int, ...]:
    """``messages`` through the chat template."""
    tokenizer = need_tokenizer(api, "chat")
    if not tokenizer.has_chat_template:
        raise ApiError("the model has no chat template; start the server with --chat-template")
    messages = [_message(message) for message in _message_list(body.get("messages"))]
    options = body.mapping("chat_template_kwargs")
    generate = body.boolean("add_generation_prompt", True)
    if reserved := options.keys() & {"messages", "conversation", "tokenize", "chat_template"}:
        raise ApiError(f"chat_template_kwargs must not have {min(reserved)}", param="messages")
    try:
        text = await asyncio.to_thread(
            lambda: tokenizer.render_chat(messages, add_generation_prompt=generate, **options)
        )
    except (ValueError, TypeError) as error:
        raise ApiError(f"the chat template refuses: {error}", param="messages") from None
    return tuple(await encode(tokenizer, text, body.boolean("add_special_tokens", False)))


def check_length(prompt_ids: tuple[int, ...], api: Api) -> None:
    """400 for a prompt without tokens, or one that leaves no room for an answer."""
    if not prompt_ids:
        raise ApiError("the prompt must not be empty", param="prompt")
    longest = api.service.max_model_len
    if len(prompt_ids) >= longest:
        raise ApiError(
            f"This model's maximum context length is {longest} tokens. However, your prompt "
            f"contains {len(prompt_ids)} input tokens and one more is needed for the answer.",
            param="prompt",
        )


def _listed(value: Any) -> list[Any]:
    """One prompt or several, as a list."""
    if value is None:
        raise ApiError("prompt is required", param="prompt")
    if isinstance(value, str):
        return [value]
    if not isinstance(value, list) or not value:
        raise ApiError("prompt must be a string or a list, and not empty", param="prompt")
    if all(is_integer(item) for item in value):
        return [value]
    if all(isinstance(item, str) for item in value) or all(isinstance(i, list) for i in value):
        return value
    raise ApiError("prompt must hold strings, token ids or lists of token ids", param="prompt")


def _check_ids(ids: list[Any], vocab_size: int) -> tuple[int, ...]:
    for token_id in ids:
        if not is_integer(token_id):
            raise ApiError("a prompt of token ids must hold integers only", param="prompt")
        if not 0 <= token_id < vocab_size:
            raise ApiError(
                f"token id {token_id} is out of vocabulary, which has {vocab_size} tokens",
                param="prompt",
            )
    return tuple(ids)


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
