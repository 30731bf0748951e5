"""``POST /v1/completions`` and ``POST /v1/chat/completions``."""

from __future__ import annotations

import asyncio

from aiohttp import web

from serve.api.answers import ChatFormat, Collected, CompletionFormat, Format
from serve.api.body import read_body
from serve.api.call import Call, check_model, make_call
from serve.api.errors import ApiError, json_response
from serve.api.prompts import check_length, read_messages, read_prompts
from serve.api.service import Stream, Unavailable
from serve.api.settings import API, Api
from serve.api.streaming import stream_answer
from serve.request import FinishReason

DEFAULT_COMPLETION_TOKENS = 16  # OpenAI's


async def completions(http: web.Request) -> web.StreamResponse:
    """Text after text."""
    api = http.app[API]
    body = await read_body(http)
    check_model(body.get("model"), api)
    _check_open(api)
    prompts = await read_prompts(body, api)
    call = make_call(http, body, api, prompts, "cmpl", DEFAULT_COMPLETION_TOKENS)
    return await _answer(http, api, call, CompletionFormat())


async def chat_completions(http: web.Request) -> web.StreamResponse:
    """The assistant's next message."""
    api = http.app[API]
    body = await read_body(http)
    check_model(body.get("model"), api)
    _check_open(api)
    prompt_ids = await read_messages(body, api)
    check_length(prompt_ids, api)
    call = make_call(http, body, api, [prompt_ids], "chatcmpl", None)
    return await _answer(http, api, call, ChatFormat())


def _check_open(api: Api) -> None:
    """503 before anything that needs the context's length, which is not known until ready."""
    if not api.service.ready:
        raise Unavailable("the server is starting")


async def _answer(http: web.Request, api: Api, call: Call, answer: Format) -> web.StreamResponse:
    """Submit, answer, and whatever happens leave no request behind."""
    streams = api.service.submit(call.requests)
    try:
        if call.stream:
            return await stream_answer(http, call, answer, api.service, streams)
        choices = await asyncio.gather(*map(_collect, streams))
        return json_response(answer.response(call, choices))
    finally:
        for request in call.requests:
            api.service.abort(request.id)  # those that have ended are not there to abort


async def _collect(stream: Stream) -> Collected:
    collected = Collected()
    async for output in stream:
        collected.add(output)
        if output.finish_reason is FinishReason.ERROR:
            raise ApiError(output.error or "the request failed", status=500)
    return collected
