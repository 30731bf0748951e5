"""What the HTTP handlers are told at start."""

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
    """Options of the front end."""

    served_model_names: tuple[str, ...]
    model_path: str
    vocab_size: int
    created: int  # Unix seconds, of the start
    api_key: str | None = None
    seed: int = 0  # of the seeds that requests get which bring none
    max_body_bytes: int = 32 << 20
    sampling: SamplingDefaults = field(default_factory=SamplingDefaults)


@dataclass(slots=True)
class Api:
    """All that a handler needs; one per application."""

    service: Service
    tokenizer: Tokenizer | None
    metrics: Metrics
    settings: ApiSettings
    seeds: random.Random = field(init=False)

    def __post_init__(self) -> None:
        self.seeds = random.Random(self.settings.seed)


API = web.AppKey("api", Api)
