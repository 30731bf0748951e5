"""Workload: plans the requests of a run: send time, prompt length, output length.

A plan is a pure function of its options, so every process of a run makes the same plan and takes
its share of it. Prompts are made shortly before they are sent, because the prompts of a long trace
would not fit into memory.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from itertools import islice, takewhile
from pathlib import Path
from typing import Any

import numpy as np

from bench.load.arrivals import scaled, send_times
from bench.load.lengths import make_lengths
from bench.load.prompts import PromptMaker
from bench.load.traces import TraceRequest, cut, read_trace

TRACES = ("mooncake", "azure", "prompts")
DEFAULT_NUM_REQUESTS = 100
DEFAULT_SPREAD = 0.5
_ARRIVALS, _LENGTHS = 0, 1  # random streams, separate so that neither depends on the other


@dataclass(frozen=True, slots=True)
class WorkloadOptions:
    """The options of a plan. ``rate`` is in requests per second."""

    workload: str = "fixed"
    input_len: int | None = None
    output_len: int | None = None
    length_spread: float | None = None
    trace: str | None = None
    max_model_len: int | None = None
    arrivals: str = "poisson"
    rate: float | None = None
    cv: float | None = None
    concurrency: int | None = None
    time_scale: float = 1.0
    num_requests: int | None = None
    duration_s: float | None = None
    seed: int = 0
    token_ids: tuple[int, int] = (1000, 30000)

    def describe(self) -> dict[str, Any]:
        """Return these options as a run file stores them."""
        return asdict(self)


@dataclass(frozen=True, slots=True)
class PlannedRequest:
    """One request, sent ``send_s`` seconds after the start; None: when a slot becomes free."""

    index: int
    send_s: float | None
    input_len: int | None  # tokens; None for text, because only the server knows its length
    max_tokens: int
    hash_ids: tuple[int, ...] = ()
    prompt: str | tuple[int, ...] | None = None

    def make_prompt(self, maker: PromptMaker) -> str | list[int]:
        if isinstance(self.prompt, str):
            return self.prompt
        if self.prompt is not None:
            return list(self.prompt)
        assert self.input_len is not None
        if self.hash_ids:
            return maker.from_hashes(self.index, self.hash_ids, self.input_len)
        return maker.tokens(self.index, self.input_len)


def make_plan(options: WorkloadOptions) -> list[PlannedRequest]:
    """Return the requests in send order. Raises ``ValueError`` if the options contradict."""
    _check(options)
    requests = _requests(options)
    times = _times(options, requests)
    if options.max_model_len is not None:
        requests = [cut(request, options.max_model_len) for request in requests]
    return [
        PlannedRequest(
            index=index,
            send_s=time_s,
            input_len=request.input_len,
            max_tokens=request.output_len or 1,
            hash_ids=request.hash_ids,
            prompt=request.prompt,
        )
        for index, (time_s, request) in enumerate(zip(times, requests, strict=False))
    ]


def _check(options: WorkloadOptions) -> None:
    if options.arrivals == "closed":
        if options.concurrency is None or options.concurrency < 1:
            raise ValueError("closed arrivals need a concurrency of 1 or more")
        if options.rate is not None:
            raise ValueError("closed arrivals take no rate: a request is sent when another ends")
    elif options.concurrency is not None:
        raise ValueError("only closed arrivals take a concurrency")
    if options.arrivals == "trace" and options.workload not in TRACES:
        raise ValueError(f"trace arrivals need one of the workloads {', '.join(TRACES)}")
    if options.arrivals in ("poisson", "gamma", "uniform") and not options.rate:
        raise ValueError(f"{options.arrivals} arrivals need a rate above 0")
    if (options.cv is not None) != (options.arrivals == "gamma"):
        raise ValueError("gamma arrivals need a coefficient of variation, others take none")
    if options.time_scale != 1.0 and options.arrivals != "trace":
        raise ValueError("only trace arrivals take a time scale")
    if options.length_spread is not None and options.workload not in ("uniform", "lognormal"):
        raise ValueError(f"{options.workload} lengths take no length spread")
    if options.trace is not None and options.workload not in TRACES:
        raise ValueError(f"the {options.workload} workload takes no trace")
    if options.num_requests is not None and options.num_requests < 1:
        raise ValueError("a run needs at least 1 request")


def _num_requests(options: WorkloadOptions) -> int:
    if options.num_requests is not None:
        return options.num_requests
    if options.duration_s is None:
        return DEFAULT_NUM_REQUESTS
    if options.arrivals == "closed":
        raise ValueError("closed arrivals need a number of requests, not a duration")
    # More than fit into the duration; ``_times`` cuts the list there.
    return int(options.duration_s * (options.rate or 0) * 2) + 100


def _requests(options: WorkloadOptions) -> list[TraceRequest]:
    if options.workload in TRACES:
        return _trace_requests(options)
    spread = DEFAULT_SPREAD if options.length_spread is None else options.length_spread
    lengths = make_lengths(options.workload, options.input_len, options.output_len, spread)
    rng = np.random.default_rng([options.seed, _LENGTHS])
    requests = []
    for _ in range(_num_requests(options)):
        input_len, output_len = lengths(rng)
        requests.append(TraceRequest(time_s=None, input_len=input_len, output_len=output_len))
    return requests


def _trace_requests(options: WorkloadOptions) -> list[TraceRequest]:
    if options.trace is None:
        raise ValueError(f"the {options.workload} workload needs --trace FILE")
    found = read_trace(options.workload, Path(options.trace))
    if options.num_requests is not None and len(found) < options.num_requests:
        raise ValueError(f"{options.trace} has {len(found)} requests, not {options.num_requests}")
    taken = found[: options.num_requests]
    if options.output_len is None and any(request.output_len is None for request in taken):
        raise ValueError(f"{options.trace} has no output lengths: give --output-len")
    return [
        TraceRequest(
            time_s=request.time_s,
            input_len=request.input_len,
            output_len=request.output_len or options.output_len,
            hash_ids=request.hash_ids,
            prompt=request.prompt,
        )
        for request in taken
    ]


def _times(options: WorkloadOptions, requests: list[TraceRequest]) -> list[float | None]:
    """Return the send times [s]; fewer than there are requests if the duration ends before."""
    if options.arrivals == "closed":
        return [None] * len(requests)
    if options.arrivals == "trace":
        own = [request.time_s for request in requests if request.time_s is not None]
        if len(own) < len(requests):
            raise ValueError(f"{options.trace} has requests without a time")
        times = scaled(own, options.rate, options.time_scale)
    else:
        assert options.rate is not None
        rng = np.random.default_rng([options.seed, _ARRIVALS])
        endless = send_times(options.arrivals, options.rate, options.cv or 1.0, rng)
        times = list(islice(endless, len(requests)))
    end_s = options.duration_s
    if end_s is not None:
        return list(takewhile(lambda time_s: time_s is None or time_s < end_s, times))
    return list(times)
