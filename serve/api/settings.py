"""The options of the front end, and the objects that its handlers share."""

from __future__ import annotations

import random
from dataclasses import dataclass, field

from aiohttp import web

from serve.api.work_pool import WorkPool
from serve.config.http import HttpLimits
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
    api_keys: tuple[str, ...] = ()  # none: no key is needed
    seed: int = 0  # of the generator that gives a seed to each request without one
    http: HttpLimits = field(default_factory=HttpLimits)
    sampling: SamplingDefaults = field(default_factory=SamplingDefaults)


@dataclass(slots=True)
class Api:
    """The objects that the handlers of one application share."""

    service: Service
    tokenizer: Tokenizer | None
    metrics: Metrics
    settings: ApiSettings
    seeds: random.Random = field(init=False)
    pool: WorkPool = field(init=False)

    def __post_init__(self) -> None:
        self.seeds = random.Random(self.settings.seed)
        self.pool = WorkPool(self.settings.http.max_body_bytes_in_work)

    @property
    def max_body_bytes(self) -> int:
        """The most bytes of a body; it may follow from the context, which is known when ready."""
        return self.settings.http.body_bytes(self.service.max_model_len)


API = web.AppKey("api", Api)
