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
from serve.api.errors import ApiError
from serve.api.sampling import read_max_tokens, read_sampling, refuse_unsupported
from serve.api.settings import Api
from serve.request import Request, SamplingParams

MAX_CHOICES = 128
MAX_REQUESTS = 4096  # prompts times n


@dataclass(frozen=True, slots=True)
class Call:
    """What was asked and how it is to be answered.

    ``requests[i]`` is choice ``i``: all choices of the first prompt, then those of the next.
    """

    id: str
    created: int
    model: str
    prompts: tuple[tuple[int, ...], ...]
    requests: tuple[Request, ...]
    stream: bool
    include_usage: bool
    continuous_usage: bool
    return_token_ids: bool
    return_timeline: bool

    def prompt_of(self, index: int) -> tuple[int, ...]:
        """The prompt of choice ``index``."""
        return self.requests[index].prompt_ids

    def usage(self, num_completion_tokens: int) -> dict[str, int]:
        """The ``usage`` object; each prompt counts once, whatever ``n``."""
        num_prompt_tokens = sum(map(len, self.prompts))
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


def make_call(
    http: web.Request,
    body: Body,
    api: Api,
    prompts: Sequence[tuple[int, ...]],
    prefix: str,
    default_max_tokens: int | None,
) -> Call:
    """Check everything but the prompts. ``default_max_tokens`` None: what the context leaves."""
    model = check_model(body.get("model"), api)
    refuse_unsupported(body)
    n = body.integer("n", 1, low=1, high=MAX_CHOICES)
    if n * len(prompts) > MAX_REQUESTS:
        raise ApiError(f"at most {MAX_REQUESTS} choices may be asked for at once", param="n")
    stream = body.boolean("stream")
    options = _stream_options(body, stream)
    max_tokens = read_max_tokens(body, default_max_tokens or api.service.max_model_len)
    requests: list[Request] = []
    for prompt_ids in prompts:
        sampling = read_sampling(body, api, len(prompt_ids), max_tokens)
        requests += _choices(prompt_ids, sampling, n)
    return Call(
        id=f"{prefix}-{http['id']}",
        created=int(time.time()),
        model=model,
        prompts=tuple(prompts),
        requests=tuple(requests),
        stream=stream,
        include_usage=options.boolean("include_usage"),
        continuous_usage=options.boolean("include_usage")
        and options.boolean("continuous_usage_stats"),
        return_token_ids=body.boolean("return_token_ids"),
        return_timeline=body.boolean("return_timeline"),
    )


def _stream_options(body: Body, stream: bool) -> Body:
    options = body.mapping("stream_options")
    if options and not stream:
        raise ApiError("stream_options is only allowed with stream", param="stream_options")
    return Body(options)


def _choices(prompt_ids: tuple[int, ...], sampling: SamplingParams, n: int) -> list[Request]:
    """``n`` requests that differ in their seed. Ids are ours: a client's may come twice."""
    unique = uuid.uuid4().hex
    return [
        Request(
            id=f"{unique}-{i}",
            prompt_ids=prompt_ids,
            sampling=replace(sampling, seed=_wrap(sampling.seed + i)),
        )
        for i in range(n)
    ]


def _wrap(seed: int) -> int:
    """``seed`` within int64, past whose end it starts again."""
    return (seed + 2**63) % 2**64 - 2**63
