"""``POST /v1/completions`` and ``POST /v1/chat/completions``."""

from __future__ import annotations

from collections.abc import Sequence

from aiohttp import web

from serve.api.answers import ChatFormat, Collected, CompletionFormat, Format
from serve.api.body import Body, read_body
from serve.api.call import Call, check_model, make_call, max_prompts, read_options
from serve.api.errors import ApiError, json_response
from serve.api.prompts import read_messages_now, read_prompts_now
from serve.api.settings import API, Api
from serve.api.streaming import stream_answer
from serve.dispatch.service import Stream, read_all
from serve.request import FinishReason

DEFAULT_COMPLETION_TOKENS = 16  # OpenAI's


async def completions(http: web.Request) -> web.StreamResponse:
    """Text after text."""
    api = http.app[API]
    body = await _read_open(http, api)
    options = read_options(http, body, api, "cmpl", DEFAULT_COMPLETION_TOKENS)
    limit = max_prompts(options, api)
    call = await body.work(lambda: make_call(options, read_prompts_now(body, api, limit), api))
    return await _answer(http, api, call, CompletionFormat())


async def chat_completions(http: web.Request) -> web.StreamResponse:
    """The assistant's next message."""
    api = http.app[API]
    body = await _read_open(http, api)
    options = read_options(http, body, api, "chatcmpl", None)
    call = await body.work(lambda: make_call(options, [read_messages_now(body, api)], api))
    return await _answer(http, api, call, ChatFormat())


async def _read_open(http: web.Request, api: Api) -> Body:
    """The body, if requests for its model are taken; nothing else is known before ready."""
    body = await read_body(http)
    check_model(body.get("model"), api)
    api.service.check_open()
    return body


async def _answer(http: web.Request, api: Api, call: Call, answer: Format) -> web.StreamResponse:
    """Submit, answer, and whatever happens leave no request behind."""
    streams = api.service.submit(call.requests)
    api.metrics.on_call(call.options.n, len(call.prompts))
    try:
        if call.options.stream:
            return await stream_answer(http, call, answer, streams)
        return json_response(answer.response(call, await _collect(streams)))
    finally:
        for request in call.requests:
            api.service.abort(request.id)  # those that have ended are not there to abort


async def _collect(streams: Sequence[Stream]) -> list[Collected]:
    choices = [Collected() for _ in streams]
    async for batch in read_all(streams):
        for index, output in batch:
            choices[index].add(output)
            if output.finish_reason is FinishReason.ERROR:
                raise ApiError(output.error or "the request failed", status=500)
    return choices
