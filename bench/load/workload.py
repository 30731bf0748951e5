"""The planned requests of a run: when each is sent, how long its prompt is, how much it asks for.

A plan is a pure function of its options, so that every process of a run makes the same plan and
takes its share of it. Prompts are made when they are about to be sent: those of a long trace would
not fit into memory.
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
_ARRIVALS, _LENGTHS = 0, 1  # random streams: one does not move when the other is used more


@dataclass(frozen=True, slots=True)
class WorkloadOptions:
    """What to send; ``rate`` in requests per second."""

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
        """These options in a run file."""
        return asdict(self)


@dataclass(frozen=True, slots=True)
class PlannedRequest:
    """One request; ``send_s`` seconds after the start, None if sent when a slot is free."""

    index: int
    send_s: float | None
    input_len: int | None  # tokens; None for text, whose length only the server knows
    max_tokens: int
    hash_ids: tuple[int, ...] = ()
    prompt: str | tuple[int, ...] | None = None

    def make_prompt(self, maker: PromptMaker) -> str | list[int]:
        """The prompt's text or token ids."""
        if isinstance(self.prompt, str):
            return self.prompt
        if self.prompt is not None:
            return list(self.prompt)
        assert self.input_len is not None
        if self.hash_ids:
            return maker.from_hashes(self.index, self.hash_ids, self.input_len)
        return maker.tokens(self.index, self.input_len)


def make_plan(options: WorkloadOptions) -> list[PlannedRequest]:
    """The requests in the order of their sending. ``ValueError`` if the options make no sense."""
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
            raise ValueError("closed-loop load needs a concurrency of 1 or more")
        if options.rate is not None:
            raise ValueError("closed-loop load has no rate: requests go when others have ended")
    elif options.concurrency is not None:
        raise ValueError("a concurrency belongs to closed-loop load")
    if options.arrivals == "trace" and options.workload not in TRACES:
        raise ValueError(f"arrivals of a trace need a trace: one of {', '.join(TRACES)}")
    if options.arrivals in ("poisson", "gamma", "uniform") and not options.rate:
        raise ValueError(f"{options.arrivals} arrivals need a rate above 0")
    if (options.cv is not None) != (options.arrivals == "gamma"):
        raise ValueError("gamma arrivals need a coefficient of variation, others have none")
    if options.time_scale != 1.0 and options.arrivals != "trace":
        raise ValueError("a time scale stretches the arrivals of a trace")
    if options.length_spread is not None and options.workload not in ("uniform", "lognormal"):
        raise ValueError(f"{options.workload} lengths have no spread to choose")
    if options.trace is not None and options.workload not in TRACES:
        raise ValueError(f"{options.workload} lengths are not read from a trace")
    if options.num_requests is not None and options.num_requests < 1:
        raise ValueError("a run needs a request")


def _num_requests(options: WorkloadOptions) -> int:
    if options.num_requests is not None:
        return options.num_requests
    if options.duration_s is None:
        return DEFAULT_NUM_REQUESTS
    if options.arrivals == "closed":
        raise ValueError("closed-loop load is ended by a number of requests, not by a duration")
    # Enough to fill the duration; the times cut it.
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
        raise ValueError(f"{options.trace} does not say how long answers are: give --output-len")
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
    """When each request is sent; fewer than there are requests if the duration ends before."""
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
