"""``POST /tokenize`` and ``POST /detokenize``."""

from __future__ import annotations

from aiohttp import web

from serve.api.body import is_integer, read_body
from serve.api.errors import ApiError, json_response
from serve.api.prompts import encode, need_tokenizer, read_messages
from serve.api.settings import API


async def tokenize(http: web.Request) -> web.Response:
    """Token ids of ``prompt``, or of ``messages`` through the chat template."""
    api = http.app[API]
    body = await read_body(http)
    tokenizer = need_tokenizer(api, "tokenize")
    if body.get("messages") is not None:
        token_ids = list(await read_messages(body, api))
    else:
        prompt = body.text("prompt")
        if prompt is None:
            raise ApiError("prompt or messages is required", param="prompt")
        special = body.boolean("add_special_tokens", True)
        token_ids = await encode(tokenizer, prompt, special)
    wanted = body.boolean("return_token_strs")
    return json_response(
        {
            "count": len(token_ids),
            "max_model_len": api.service.max_model_len,
            "tokens": token_ids,
            "token_strs": [tokenizer.id_to_token(i) for i in token_ids] if wanted else None,
        }
    )


async def detokenize(http: web.Request) -> web.Response:
    """The text of ``tokens``."""
    api = http.app[API]
    body = await read_body(http)
    tokenizer = need_tokenizer(api, "detokenize")
    tokens = body.get("tokens")
    largest = 2**31
    if not isinstance(tokens, list) or not all(
        is_integer(token) and 0 <= token < largest for token in tokens
    ):
        raise ApiError("tokens must be a list of token ids", param="tokens")
    return json_response({"prompt": tokenizer.decode(tokens, skip_special_tokens=False)})
