"""Metrics: the Prometheus counters, gauges and histograms of rank 0.

Metrics that vLLM has too carry vLLM's names and labels, so that dashboards made for vLLM work. The
label ``model_name`` is the model and ``engine`` the replica, or "0" for a metric of the whole job.
Metrics that only this server has start with ``serve:``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, TypeVar

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest

from serve.dispatch.output import Output
from serve.protocol.messages import ReplicaLoad, Report
from serve.request import FinishReason, Request, Timeline

Family = TypeVar("Family", Counter, Gauge, Histogram)

_TTFT_S = (
    0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0,
    20.0, 40.0, 80.0, 160.0, 640.0, 2560.0,
)  # fmt: skip
_ITL_S = (
    0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0,
    40.0, 80.0,
)  # fmt: skip
_LATENCY_S = (
    0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0, 120.0, 240.0,
    480.0, 960.0, 1920.0, 7680.0,
)  # fmt: skip
_STAGE_S = (0.0001, 0.001, 0.005, 0.01, 0.025, 0.05, *_ITL_S[4:], 160.0)
_TOKENS = tuple(float(m * 10**e) for e in range(6) for m in (1, 2, 5))
_ITERATION = (1.0, *(float(2**e) for e in range(3, 15)))

# DistServe's five stages (OSDI'24, section 4) as the first and last stamp of each.
_STAGES = {
    "prefill_queue": ("prefill_queued_s", "prefill_started_s"),
    "prefill": ("prefill_started_s", "prefill_ended_s"),
    "transfer": ("transfer_started_s", "transfer_ended_s"),
    "decode_queue": ("decode_queued_s", "decode_started_s"),
    "decode": ("decode_started_s", "finished_s"),
}

_HISTOGRAMS = {
    "time_to_first_token_seconds": ("Time from arrival to the first token.", _TTFT_S),
    "inter_token_latency_seconds": (
        "Time between two outputs, divided by the number of tokens in the second.",
        _ITL_S,
    ),
    "request_time_per_output_token_seconds": (
        "Mean time per output token of a request, without the first token.",
        _ITL_S,
    ),
    "e2e_request_latency_seconds": ("Time from arrival to the last token.", _LATENCY_S),
    "request_queue_time_seconds": ("Time in the prefill queue.", _LATENCY_S),
    "request_prefill_time_seconds": ("Time to compute the prompt.", _LATENCY_S),
    "request_decode_time_seconds": ("Time from the first token to the last.", _LATENCY_S),
    "request_inference_time_seconds": (
        "Time from the start of prefill to the last token.",
        _LATENCY_S,
    ),
    "request_prompt_tokens": ("Tokens in the prompt.", _TOKENS),
    "request_generation_tokens": ("Tokens in the output.", _TOKENS),
    "request_max_num_generation_tokens": ("Tokens in the longest output of a request.", _TOKENS),
    "request_params_max_tokens": ("max_tokens of the request.", _TOKENS),
    "request_params_n": ("Choices per request.", (1.0, 2.0, 5.0, 10.0, 20.0)),
    "iteration_tokens_total": ("Tokens computed in one step.", _ITERATION),
}

# vLLM's names for some of these stages.
_VLLM_STAGES = {
    "prefill_queue": "request_queue_time_seconds",
    "prefill": "request_prefill_time_seconds",
    "inference": "request_inference_time_seconds",
}

_COUNTERS = {
    "prompt_tokens": "Prompt tokens accepted.",
    "generation_tokens": "Tokens generated.",
}

_GAUGES = {
    "num_requests_running": "Requests in a replica's batches.",
    "num_requests_waiting": "Requests waiting in a replica.",
    "kv_cache_usage_perc": "Used share of a replica's KV blocks, 0 to 1.",
}

_REPLICA_GAUGES = (
    "num_blocks", "num_free_blocks", "num_waiting", "num_running", "num_receiving", "num_sending",
)  # fmt: skip


@dataclass(slots=True)
class _OpenRequest:
    """What has to be known of a request until it ends."""

    request: Request
    arrived_s: float
    num_tokens: int = 0
    first_s: float = 0.0
    last_s: float = 0.0


@dataclass(slots=True)
class _LoadGauges:
    """The metrics that show the load of one replica."""

    own: dict[str, Gauge]
    vllm: dict[str, Gauge]
    preemptions: Counter
    num_preemptions: int = 0

    def update(self, load: ReplicaLoad) -> None:
        for name, gauge in self.own.items():
            gauge.set(getattr(load, name))
        used = load.num_blocks - load.num_free_blocks
        self.vllm["num_requests_running"].set(load.num_running)
        self.vllm["num_requests_waiting"].set(load.num_waiting)
        self.vllm["kv_cache_usage_perc"].set(used / max(1, load.num_blocks))
        if load.num_preemptions > self.num_preemptions:
            self.preemptions.inc(load.num_preemptions - self.num_preemptions)
            self.num_preemptions = load.num_preemptions


class Metrics:
    """All metrics of a job, in a registry of their own.

    Every method but ``exposition`` is called on the event loop of rank 0.
    """

    def __init__(self, model_name: str) -> None:
        self._registry = CollectorRegistry()
        self._model_name = model_name
        self._open: dict[str, _OpenRequest] = {}
        self._loads: dict[int, _LoadGauges] = {}
        self._histograms = {
            name: self._family(Histogram, f"vllm:{name}", help_, buckets=buckets).labels(
                model_name, "0"
            )
            for name, (help_, buckets) in _HISTOGRAMS.items()
        }
        stages = self._family(
            Histogram,
            "serve:request_stage_seconds",
            "Time in one stage of a request.",
            "stage",
            buckets=_STAGE_S,
        )
        self._stages = {stage: stages.labels(model_name, "0", stage) for stage in _STAGES}
        self._counters = {
            name: self._family(Counter, f"vllm:{name}", help_).labels(model_name, "0")
            for name, help_ in _COUNTERS.items()
        }
        success = self._family(
            Counter, "vllm:request_success", "Requests ended.", "finished_reason"
        )
        # Create all reasons now, because a counter that appears with its first event has no rate.
        self._success = {
            reason: success.labels(model_name, "0", str(reason)) for reason in FinishReason
        }
        self._rejected = self._family(
            Counter, "serve:requests_rejected", "Requests refused.", "reason"
        )
        self._preemptions = self._family(Counter, "vllm:num_preemptions", "Preemptions.")
        self._cache_config = self._family(
            Gauge, "vllm:cache_config_info", "KV cache of a replica.", "block_size",
            "num_gpu_blocks",
        )  # fmt: skip
        self._gauges = {
            name: self._family(Gauge, f"vllm:{name}", help_) for name, help_ in _GAUGES.items()
        }
        self._replica_gauges = {
            name: self._family(Gauge, f"serve:replica_{name}", f"{name} of a replica.")
            for name in _REPLICA_GAUGES
        }

    def exposition(self) -> tuple[bytes, str]:
        """Return the body of ``GET /metrics`` and its content type.

        It takes milliseconds, so it may be called in any thread.
        """
        return generate_latest(self._registry), CONTENT_TYPE_LATEST

    def on_ready(self, replica_id: int, num_blocks: int, block_size: int) -> None:
        """Publish the size of a replica's KV cache: blocks, and tokens in each block."""
        labels = (self._model_name, str(replica_id), str(block_size), str(num_blocks))
        self._cache_config.labels(*labels).set(1)

    def on_call(self, n: int, num_prompts: int) -> None:
        """Count an API call with ``num_prompts`` prompts and ``n`` choices of each."""
        for _ in range(num_prompts):
            self._histograms["request_params_n"].observe(n)

    def on_accepted(self, request: Request, now_s: float) -> None:
        """Count a request that was dispatched."""
        self._open[request.id] = _OpenRequest(request, now_s)
        self._counters["prompt_tokens"].inc(request.num_prompt_tokens)
        self._histograms["request_params_max_tokens"].observe(request.sampling.max_tokens)

    def on_rejected(self, reason: str, count: int) -> None:
        """Count ``count`` refused requests."""
        self._rejected.labels(self._model_name, "0", reason).inc(count)

    def on_output(self, output: Output, now_s: float) -> None:
        """Count the new tokens of a request, and its end if it has ended."""
        state = self._open[output.request_id]
        count = len(output.token_ids)
        if count:
            self._observe_tokens(state, count, now_s)
        if output.finish_reason is not None:
            del self._open[output.request_id]
            self._observe_end(state, output, output.finish_reason, now_s)

    def forget(self, request_id: str) -> None:
        """Stop counting a request whose output could not be passed on."""
        if self._open.pop(request_id, None) is not None:
            self._success[FinishReason.ERROR].inc()

    def on_report(self, report: Report) -> None:
        """Show a replica's load and count the tokens of its step."""
        gauges = self._loads.get(report.replica_id)
        if gauges is None:
            gauges = self._loads[report.replica_id] = self._load_gauges(report.replica_id)
        gauges.update(report.load)
        if report.num_step_tokens:
            self._histograms["iteration_tokens_total"].observe(report.num_step_tokens)

    def _observe_tokens(self, state: _OpenRequest, count: int, now_s: float) -> None:
        self._counters["generation_tokens"].inc(count)
        if state.num_tokens == 0:
            state.first_s = now_s
            self._histograms["time_to_first_token_seconds"].observe(now_s - state.arrived_s)
        else:
            gap_s = (now_s - state.last_s) / count
            for _ in range(count):
                self._histograms["inter_token_latency_seconds"].observe(gap_s)
        state.num_tokens += count
        state.last_s = now_s

    def _observe_end(
        self, state: _OpenRequest, output: Output, reason: FinishReason, now_s: float
    ) -> None:
        self._success[reason].inc()
        observe = {name: child.observe for name, child in self._histograms.items()}
        observe["request_prompt_tokens"](state.request.num_prompt_tokens)
        observe["request_generation_tokens"](state.num_tokens)
        observe["request_max_num_generation_tokens"](state.num_tokens)
        observe["e2e_request_latency_seconds"](now_s - state.arrived_s)
        if state.num_tokens > 1:
            decode_s = state.last_s - state.first_s
            observe["request_decode_time_seconds"](decode_s)
            observe["request_time_per_output_token_seconds"](decode_s / (state.num_tokens - 1))
        if output.timeline is not None:
            self._observe_timeline(output.timeline)

    def _observe_timeline(self, timeline: Timeline) -> None:
        spans = {stage: _span(timeline, start, end) for stage, (start, end) in _STAGES.items()} | {
            "inference": _span(timeline, "prefill_started_s", "finished_s")
        }
        for stage, span in spans.items():
            if span is not None and stage in self._stages:
                self._stages[stage].observe(span)
            if span is not None and stage in _VLLM_STAGES:
                self._histograms[_VLLM_STAGES[stage]].observe(span)

    def _load_gauges(self, replica_id: int) -> _LoadGauges:
        labels = (self._model_name, str(replica_id))
        return _LoadGauges(
            {name: gauge.labels(*labels) for name, gauge in self._replica_gauges.items()},
            {name: gauge.labels(*labels) for name, gauge in self._gauges.items()},
            self._preemptions.labels(*labels),
        )

    def _family(
        self, kind: type[Family], name: str, help_: str, *more: str, **options: Any
    ) -> Family:
        labels = ("model_name", "engine", *more)
        return kind(name, help_, labels, registry=self._registry, **options)


def _span(timeline: Timeline, start: str, end: str) -> float | None:
    """Return the seconds between two stamps, or None if one is missing."""
    begin_s, end_s = getattr(timeline, start), getattr(timeline, end)
    # The stamps may come from two clocks, whose offset has an error: never below zero.
    return None if begin_s is None or end_s is None else max(0.0, end_s - begin_s)
