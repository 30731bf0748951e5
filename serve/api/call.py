"""Call: one HTTP request for text, and the requests to the service that answer it."""

from __future__ import annotations

import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass

from aiohttp import web
from msgspec.structs import replace

from serve.api.errors import ID, ApiError
from serve.api.models import check_model
from serve.api.sampling_params import make_sampling_params
from serve.api.schemas import GenerationRequest
from serve.api.settings import Api
from serve.api.validation import InvalidField
from serve.request import Request, SamplingParams, pack_ids, unpack_ids

MAX_REQUESTS = 512  # prompts times n, because each holds the event loop for about 15 us
MAX_PROMPT_TOKENS = 1 << 23  # of all requests of a call together


@dataclass(frozen=True, slots=True)
class Head:
    """The fields that every object of an answer begins with."""

    id: str
    created: int  # Unix seconds
    model: str


@dataclass(frozen=True, slots=True)
class Call:
    """``requests[i]`` is choice ``i``: first all choices of the first prompt, then of the next."""

    head: Head
    body: GenerationRequest
    prompts: tuple[memoryview[int], ...]  # of token ids
    requests: tuple[Request, ...]

    def prompt_of(self, index: int) -> list[int]:
        """Return the token ids of the prompt that choice ``index`` continues."""
        return self.requests[index].prompt_ids.tolist()

    def usage(self, num_completion_tokens: int) -> dict[str, int]:
        """Return the ``usage`` object. Each prompt counts once, for any ``n``."""
        return usage_object(sum(map(len, self.prompts)), num_completion_tokens)


def usage_object(num_prompt_tokens: int, num_completion_tokens: int) -> dict[str, int]:
    """Return a ``usage`` object."""
    return {
        "prompt_tokens": num_prompt_tokens,
        "completion_tokens": num_completion_tokens,
        "total_tokens": num_prompt_tokens + num_completion_tokens,
    }


def make_head(http: web.Request, body: GenerationRequest, api: Api, id_prefix: str) -> Head:
    """Name the answer; 404 if the model is not served here."""
    model = check_model(body.model, api)
    return Head(f"{id_prefix}-{http[ID]}", int(time.time()), model)


def read_sampling(body: GenerationRequest, api: Api) -> SamplingParams:
    """Return the parameters of all choices; raise ``InvalidField`` for what this server lacks."""
    if body.n > _max_requests(api):
        raise InvalidField(f"n must be in [1, {_max_requests(api)}], got {body.n}", "n")
    return make_sampling_params(
        body,
        api.settings.sampling,
        max_tokens=body.default_max_tokens or api.service.max_model_len,
        vocab_size=api.settings.vocab_size,
        has_tokenizer=api.tokenizer is not None,
    )


def max_prompts(body: GenerationRequest, api: Api) -> int:
    """Return the number of prompts allowed with this ``n``."""
    return _max_requests(api) // body.n


def _max_requests(api: Api) -> int:
    # More than max_waiting can never be accepted, so it is a 400 and not a 429 to be tried again.
    return max(1, min(MAX_REQUESTS, api.service.max_waiting))


def make_call(
    head: Head,
    body: GenerationRequest,
    sampling: SamplingParams,
    prompts: Sequence[tuple[int, ...]],
    api: Api,
) -> Call:
    """Make ``n`` requests of each prompt. The prompts are checked already."""
    num_requests, num_tokens = body.n * len(prompts), body.n * sum(map(len, prompts))
    limit = min(MAX_PROMPT_TOKENS, api.service.max_waiting_tokens)
    # Like max_waiting: a call that can never be accepted is a 400. One prompt always can.
    if num_tokens > limit and num_requests > 1:
        raise ApiError(f"prompts times n exceed {limit} tokens", param="prompt")
    requests: list[Request] = []
    packed = [pack_ids(prompt_ids) for prompt_ids in prompts]
    for prompt, prompt_ids in zip(packed, prompts, strict=True):
        seed = sampling.seed if body.seed is not None else api.seeds.getrandbits(63)
        room = api.service.max_model_len - len(prompt_ids)
        requests += _choices(prompt, sampling, body.n, seed, room)
    return Call(head, body, tuple(map(unpack_ids, packed)), tuple(requests))


def _choices(
    prompt: bytes, sampling: SamplingParams, n: int, seed: int, room: int
) -> list[Request]:
    """Return ``n`` requests that differ in their seed, of at most ``room`` new tokens each.

    Their ids are random, because two clients can choose the same id for their requests.
    """
    max_tokens = min(sampling.max_tokens, room)
    min_tokens = min(sampling.min_tokens, max_tokens)
    unique = uuid.uuid4().hex
    return [
        Request(
            id=f"{unique}-{i}",
            prompt=prompt,
            sampling=replace(
                sampling, max_tokens=max_tokens, min_tokens=min_tokens, seed=_wrap(seed + i)
            ),
        )
        for i in range(n)
    ]


def _wrap(seed: int) -> int:
    """Wrap ``seed`` into the range of int64."""
    return (seed + 2**63) % 2**64 - 2**63
