"""``POST /v1/completions`` and ``POST /v1/chat/completions``."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from aiohttp import web

from serve.api.answers import ChatFormat, Collected, CompletionFormat, Format, answer_bytes
from serve.api.body import read_request, work_on_body
from serve.api.call import Call, make_call, make_head, max_prompts, read_sampling
from serve.api.client_identity import client_of
from serve.api.errors import ApiError, json_response
from serve.api.prompts import read_messages, read_prompts
from serve.api.schemas import ChatCompletionRequest, CompletionRequest, GenerationRequest
from serve.api.settings import API, Api
from serve.api.streaming import stream_answer
from serve.dispatch.service import Stream, read_all
from serve.request import FinishReason

Prompts = Sequence[tuple[int, ...]]


async def completions(http: web.Request) -> web.StreamResponse:
    """Continue each prompt."""
    api = http.app[API]
    body = await read_request(http, CompletionRequest)
    call = await _make_call(
        http, body, "cmpl", lambda: read_prompts(body, api, max_prompts(body, api))
    )
    return await _answer(http, api, call, CompletionFormat())


async def chat_completions(http: web.Request) -> web.StreamResponse:
    """Write the assistant's next message."""
    api = http.app[API]
    body = await read_request(http, ChatCompletionRequest)
    call = await _make_call(http, body, "chatcmpl", lambda: [read_messages(body, api)])
    return await _answer(http, api, call, ChatFormat())


async def _make_call(
    http: web.Request,
    body: GenerationRequest,
    id_prefix: str,
    read: Callable[[], Prompts],
) -> Call:
    """Check the parameters, which is quick, before ``read`` makes token ids of the prompts."""
    api = http.app[API]
    head = make_head(http, body, api, id_prefix)
    sampling = read_sampling(body, api)
    return await work_on_body(http, lambda: make_call(head, body, sampling, read(), api))


async def _answer(http: web.Request, api: Api, call: Call, form: Format) -> web.StreamResponse:
    """Submit the requests and answer. Afterwards abort those that have not ended."""
    streams = api.service.submit(call.requests, client=client_of(http))
    api.metrics.on_call(call.body.n, len(call.prompts))
    try:
        if call.body.stream:
            return await stream_answer(http, call, form, streams)
        choices = await _collect(streams)
        size = answer_bytes(call, choices)
        return await api.pool.run(size, lambda: json_response(form.response(call, choices)))
    finally:
        for request in call.requests:
            api.service.abort(request.id)  # has no effect on requests that have ended


async def _collect(streams: Sequence[Stream]) -> list[Collected]:
    choices = [Collected() for _ in streams]
    async for batch in read_all(streams):
        for index, output in batch:
            choices[index].add(output)
            if output.finish_reason is FinishReason.ERROR:
                raise ApiError(output.error or "the request failed", status=500)
    return choices
