"""``POST /tokenize`` and ``POST /detokenize``."""

from __future__ import annotations

from typing import Any

from aiohttp import web

from serve.api.body import Body, read_body
from serve.api.call import check_model
from serve.api.errors import ApiError, json_response
from serve.api.prompts import are_token_ids_now, encode_now, need_tokenizer, render_messages_now
from serve.api.settings import API, Api

_MAX_ID = 2**31  # ids that the vocabulary lacks read as U+FFFD


async def tokenize(http: web.Request) -> web.Response:
    """Token ids of ``prompt``, or of ``messages`` through the chat template."""
    api = http.app[API]
    body = await read_body(http)
    check_model(body.get("model"), api)
    api.service.check_open()
    return json_response(await body.work(lambda: _tokenize_now(body, api)))


async def detokenize(http: web.Request) -> web.Response:
    """The text of ``tokens``."""
    api = http.app[API]
    body = await read_body(http)
    check_model(body.get("model"), api)
    api.service.check_open()
    return json_response(await body.work(lambda: _detokenize_now(body, api)))


def _tokenize_now(body: Body, api: Api) -> dict[str, Any]:
    tokenizer = need_tokenizer(api, "tokenize")
    wanted = body.boolean("return_token_strs")
    if body.get("messages") is not None:
        token_ids = render_messages_now(body, api)
    else:
        prompt = body.text("prompt")
        if prompt is None:
            raise ApiError("prompt or messages is required", param="prompt")
        token_ids = encode_now(tokenizer, prompt, body.boolean("add_special_tokens", True))
    return {
        "count": len(token_ids),
        "max_model_len": api.service.max_model_len,
        "tokens": token_ids,
        "token_strs": [tokenizer.id_to_token(i) for i in token_ids] if wanted else None,
    }


def _detokenize_now(body: Body, api: Api) -> dict[str, Any]:
    tokenizer = need_tokenizer(api, "detokenize")
    tokens = body.get("tokens")
    if not are_token_ids_now(tokens, _MAX_ID):
        raise ApiError("tokens must be a list of token ids", param="tokens")
    return {"prompt": tokenizer.decode(tokens, skip_special_tokens=False)}
