"""The options of the front end, and the objects that its handlers share."""

from __future__ import annotations

import random
from dataclasses import dataclass, field

from aiohttp import web

from serve.config.sampling_defaults import SamplingDefaults
from serve.dispatch.metrics import Metrics
from serve.dispatch.service import Service
from serve.tokenizer.tokenizer import Tokenizer


@dataclass(frozen=True, slots=True)
class ApiSettings:
    """Options of the front end, which do not change while it runs."""

    served_model_names: tuple[str, ...]
    model_path: str
    vocab_size: int
    created: int  # when the server started, in Unix seconds
    api_key: str | None = None
    seed: int = 0  # of the generator that gives a seed to each request without one
    max_body_bytes: int = 32 << 20
    sampling: SamplingDefaults = field(default_factory=SamplingDefaults)


@dataclass(slots=True)
class Api:
    """The objects that the handlers of one application share."""

    service: Service
    tokenizer: Tokenizer | None
    metrics: Metrics
    settings: ApiSettings
    seeds: random.Random = field(init=False)

    def __post_init__(self) -> None:
        self.seeds = random.Random(self.settings.seed)


API = web.AppKey("api", Api)
