"""``POST /tokenize`` and ``POST /detokenize``."""

from __future__ import annotations

from typing import Any

from aiohttp import web

from serve.api.body import read_request, work_on_body
from serve.api.encoding import json_list
from serve.api.errors import ApiError, json_response
from serve.api.models import check_model
from serve.api.prompts import are_token_ids, encode, need_tokenizer, render_messages
from serve.api.schemas import DetokenizeRequest, TokenizeRequest
from serve.api.settings import API, Api

_MAX_ID = 2**31  # ids outside the vocabulary become U+FFFD


async def tokenize(http: web.Request) -> web.Response:
    """Answer with the token ids of ``prompt``, or of ``messages`` in the chat template."""
    api = http.app[API]
    body = await read_request(http, TokenizeRequest)
    check_model(body.model, api)
    return await work_on_body(http, lambda: json_response(_tokenize(body, api)))


async def detokenize(http: web.Request) -> web.Response:
    """Answer with the text of ``tokens``."""
    api = http.app[API]
    body = await read_request(http, DetokenizeRequest)
    check_model(body.model, api)
    return await work_on_body(http, lambda: json_response(_detokenize(body, api)))


def _tokenize(body: TokenizeRequest, api: Api) -> dict[str, Any]:
    tokenizer = need_tokenizer(api, "tokenize")
    special = body.add_special_tokens
    if body.messages is not None:
        token_ids = encode(tokenizer, render_messages(body, api), special or False)
    else:
        token_ids = encode(tokenizer, body.prompt or "", special is None or special)
    strings = [tokenizer.id_to_token(i) for i in token_ids] if body.return_token_strs else None
    return {
        "count": len(token_ids),
        "max_model_len": api.service.max_model_len,
        "tokens": json_list(token_ids),
        "token_strs": None if strings is None else json_list(strings),
    }


def _detokenize(body: DetokenizeRequest, api: Api) -> dict[str, Any]:
    tokenizer = need_tokenizer(api, "detokenize")
    if not are_token_ids(body.tokens, _MAX_ID):
        raise ApiError("tokens must be a list of token ids", param="tokens")
    return {"prompt": tokenizer.decode(body.tokens, skip_special_tokens=False)}
