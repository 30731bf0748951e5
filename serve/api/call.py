"""Call: one HTTP request for text, as the requests that it makes of the service."""

from __future__ import annotations

import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from aiohttp import web
from msgspec.structs import replace

from serve.api.body import Body
from serve.api.errors import ID, NAMED, ApiError, sane_id
from serve.api.sampling_params import read_max_tokens, read_sampling, refuse_unsupported
from serve.api.settings import Api
from serve.request import Request, SamplingParams

MAX_CHOICES = 128  # of one prompt
MAX_REQUESTS = 512  # prompts times n: each takes the event loop some 15 us at a stretch
MAX_PROMPT_TOKENS = 1 << 23  # of all requests of a call together


@dataclass(frozen=True, slots=True)
class Options:
    """What a body says beside its prompts."""

    id: str
    created: int
    model: str
    n: int
    sampling: SamplingParams  # max_tokens and min_tokens as asked, before the context is known
    seeded: bool  # whether sampling.seed is the client's
    stream: bool
    include_usage: bool
    continuous_usage: bool
    return_token_ids: bool
    return_timeline: bool


@dataclass(frozen=True, slots=True)
class Call:
    """``requests[i]`` is choice ``i``: all choices of the first prompt, then those of the next."""

    options: Options
    prompts: tuple[tuple[int, ...], ...]
    requests: tuple[Request, ...]

    def prompt_of(self, index: int) -> tuple[int, ...]:
        """The prompt of choice ``index``."""
        return self.requests[index].prompt_ids

    def usage(self, num_completion_tokens: int) -> dict[str, int]:
        """The ``usage`` object; each prompt counts once, whatever ``n``."""
        return usage_object(sum(map(len, self.prompts)), num_completion_tokens)


def usage_object(num_prompt_tokens: int, num_completion_tokens: int) -> dict[str, int]:
    """``usage`` of so many tokens."""
    return {
        "prompt_tokens": num_prompt_tokens,
        "completion_tokens": num_completion_tokens,
        "total_tokens": num_prompt_tokens + num_completion_tokens,
    }


def check_model(name: Any, api: Api) -> str:
    """The served name that a body asks for; 404 if it is not served here."""
    names = api.settings.served_model_names
    if name is None or name == "":
        return names[0]
    if not isinstance(name, str):
        raise ApiError("model must be a string", param="model")
    if name not in names:
        raise ApiError(f"The model `{name[:200]}` does not exist.", status=404, param="model")
    return name


def read_options(
    http: web.Request, body: Body, api: Api, prefix: str, default_max_tokens: int | None
) -> Options:
    """Check everything but the prompts. ``default_max_tokens`` None: what the context leaves."""
    model = check_model(body.get("model"), api)
    refuse_unsupported(body)
    stream = body.boolean("stream")
    stream_options = _stream_options(body, stream)
    include_usage = stream_options.boolean("include_usage")
    max_tokens = read_max_tokens(body, default_max_tokens or api.service.max_model_len)
    _take_id(http, body)
    return Options(
        id=f"{prefix}-{http[ID]}",
        created=int(time.time()),
        model=model,
        n=body.integer("n", 1, low=1, high=min(MAX_CHOICES, _max_requests(api))),
        sampling=read_sampling(body, api, max_tokens),
        seeded=body.get("seed") is not None,
        stream=stream,
        include_usage=include_usage,
        continuous_usage=stream_options.boolean("continuous_usage_stats") and include_usage,
        return_token_ids=body.boolean("return_token_ids"),
        return_timeline=body.boolean("return_timeline"),
    )


def max_prompts(options: Options, api: Api) -> int:
    """How many prompts may come with this ``n``."""
    return _max_requests(api) // options.n


def _max_requests(api: Api) -> int:
    # What can never be taken is the client's mistake, and not worth another try.
    return max(1, min(MAX_REQUESTS, api.service.max_waiting))


def make_call(options: Options, prompts: Sequence[tuple[int, ...]], api: Api) -> Call:
    """The requests for ``prompts``, which are checked."""
    if options.n * sum(map(len, prompts)) > MAX_PROMPT_TOKENS:
        raise ApiError(f"prompts times n exceed {MAX_PROMPT_TOKENS} tokens", param="prompt")
    requests: list[Request] = []
    for prompt_ids in prompts:
        requests += _choices(prompt_ids, options, api)
    return Call(options, tuple(prompts), tuple(requests))


def _stream_options(body: Body, stream: bool) -> Body:
    options = body.mapping("stream_options")
    if options and not stream:
        raise ApiError("stream_options is only allowed with stream", param="stream_options")
    return Body(options)


def _take_id(http: web.Request, body: Body) -> None:
    """Let ``request_id`` name a request that no header names."""
    given = body.get("request_id")
    if not http[NAMED] and isinstance(given, str) and sane_id(given):
        http[ID] = given


def _choices(prompt_ids: tuple[int, ...], options: Options, api: Api) -> list[Request]:
    """``n`` requests that differ in their seed. Ids are ours: a client's may come twice."""
    asked = options.sampling
    max_tokens = min(asked.max_tokens, api.service.max_model_len - len(prompt_ids))
    min_tokens = min(asked.min_tokens, max_tokens)
    seed = asked.seed if options.seeded else api.seeds.getrandbits(63)
    unique = uuid.uuid4().hex
    return [
        Request(
            id=f"{unique}-{i}",
            prompt_ids=prompt_ids,
            sampling=replace(
                asked, max_tokens=max_tokens, min_tokens=min_tokens, seed=_wrap(seed + i)
            ),
        )
        for i in range(options.n)
    ]


def _wrap(seed: int) -> int:
    """``seed`` within int64, past whose end it starts again."""
    return (seed + 2**63) % 2**64 - 2**63
