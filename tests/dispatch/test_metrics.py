"""Metrics: those that stock dashboards use exist, with the right values after a request."""

from __future__ import annotations

import pytest
from prometheus_client.parser import text_string_to_metric_families

from serve.dispatch.metrics import Metrics
from serve.dispatch.output import Output
from serve.protocol.messages import ReplicaLoad, Report
from serve.request import FinishReason, Request, SamplingParams, Timeline, pack_ids

HISTOGRAMS = (
    "e2e_request_latency_seconds", "time_to_first_token_seconds", "inter_token_latency_seconds",
    "request_time_per_output_token_seconds", "request_queue_time_seconds",
    "request_prefill_time_seconds", "request_decode_time_seconds", "request_params_n",
    "request_inference_time_seconds", "request_max_num_generation_tokens",
    "request_prompt_tokens", "request_generation_tokens", "iteration_tokens_total",
    "request_params_max_tokens",
)  # fmt: skip
COUNTERS = ("prompt_tokens_total", "generation_tokens_total", "num_preemptions_total")
GAUGES = ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc")


def samples(metrics: Metrics) -> dict[tuple[str, frozenset[tuple[str, str]]], float]:
    """Return every exposed value by its name and its labels without the model's name."""
    found = {}
    for family in text_string_to_metric_families(metrics.exposition()[0].decode()):
        for sample in family.samples:
            labels = dict(sample.labels)
            assert labels.pop("model_name") == "m"
            key = (sample.name, frozenset(labels.items()))
            assert key not in found
            found[key] = sample.value
    return found


def value(metrics: Metrics, name: str, **labels: str) -> float:
    labels.setdefault("engine", "0")
    return samples(metrics)[name, frozenset(labels.items())]


def output(
    index: int,
    count: int,
    reason: FinishReason | None = None,
    timeline: Timeline | None = None,
) -> Output:
    return Output(
        request_id="a",
        first_index=index,
        token_ids=tuple(range(count)),
        text="",
        finish_reason=reason,
        timeline=timeline,
    )


@pytest.fixture
def metrics() -> Metrics:
    """Return metrics of one request of 4 prompt tokens and 4 output tokens, and of two reports."""
    metrics = Metrics("m")
    sampling = SamplingParams(max_tokens=7)
    metrics.on_ready(0, 100, 16)
    metrics.on_call(2, 1)
    metrics.on_accepted(Request(id="a", prompt=pack_ids((1, 2, 3, 4)), sampling=sampling), 10.0)
    metrics.on_output(output(0, 1), 10.5)
    metrics.on_output(output(1, 1), 10.6)
    timeline = Timeline(
        arrived_s=10.0,
        prefill_queued_s=10.0,
        prefill_started_s=10.2,
        prefill_ended_s=10.5,
        transfer_started_s=10.51,
        transfer_ended_s=10.52,
        decode_queued_s=10.52,
        decode_started_s=10.53,
        finished_s=11.0,
    )
    metrics.on_output(output(2, 2, FinishReason.LENGTH, timeline=timeline), 11.0)
    load = ReplicaLoad(
        num_blocks=100, num_free_blocks=25, num_running=3, num_waiting=2, num_preemptions=4
    )
    metrics.on_report(Report(0, load, (), 32))
    metrics.on_report(Report(0, load, (), 0))
    return metrics


def test_all_metrics_of_stock_dashboards_exist(metrics: Metrics) -> None:
    names = {name for name, _ in samples(metrics)}
    for name in HISTOGRAMS:
        assert {f"vllm:{name}_{part}" for part in ("bucket", "sum", "count")} <= names
    assert {f"vllm:{name}" for name in COUNTERS + GAUGES} <= names
    assert {"vllm:request_success_total", "vllm:cache_config_info"} <= names


def test_reasons_exist_before_their_first_request() -> None:
    for reason in ("stop", "length", "abort", "error"):
        assert value(Metrics("m"), "vllm:request_success_total", finished_reason=reason) == 0


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("vllm:prompt_tokens_total", 4),
        ("vllm:generation_tokens_total", 4),
        ("vllm:time_to_first_token_seconds_sum", 0.5),
        ("vllm:inter_token_latency_seconds_count", 3),
        ("vllm:inter_token_latency_seconds_sum", 0.5),
        ("vllm:request_time_per_output_token_seconds_sum", 0.5 / 3),
        ("vllm:e2e_request_latency_seconds_sum", 1.0),
        ("vllm:e2e_request_latency_seconds_count", 1),
        ("vllm:request_queue_time_seconds_sum", 0.2),
        ("vllm:request_prefill_time_seconds_sum", 0.3),
        ("vllm:request_decode_time_seconds_sum", 0.5),
        ("vllm:request_inference_time_seconds_sum", 0.8),
        ("vllm:request_prompt_tokens_sum", 4),
        ("vllm:request_generation_tokens_sum", 4),
        ("vllm:request_max_num_generation_tokens_sum", 4),
        ("vllm:request_params_max_tokens_sum", 7),
        ("vllm:request_params_n_sum", 2),
        ("vllm:request_params_n_count", 1),
        ("vllm:iteration_tokens_total_sum", 32),
        ("vllm:iteration_tokens_total_count", 1),
        ("vllm:num_requests_running", 3),
        ("vllm:num_requests_waiting", 2),
        ("vllm:kv_cache_usage_perc", 0.75),
        ("vllm:num_preemptions_total", 4),
        ("serve:replica_num_free_blocks", 25),
    ],
)
def test_values_after_one_request(metrics: Metrics, name: str, expected: float) -> None:
    assert value(metrics, name) == pytest.approx(expected)


def test_labelled_values_after_one_request(metrics: Metrics) -> None:
    assert value(metrics, "vllm:request_success_total", finished_reason="length") == 1
    assert value(metrics, "vllm:request_success_total", finished_reason="stop") == 0
    assert value(metrics, "vllm:cache_config_info", block_size="16", num_gpu_blocks="100") == 1
    spans = {"prefill_queue": 0.2, "prefill": 0.3, "transfer": 0.01, "decode_queue": 0.01}
    for stage, seconds in (spans | {"decode": 0.47}).items():
        got = value(metrics, "serve:request_stage_seconds_sum", stage=stage)
        assert got == pytest.approx(seconds), stage


def test_an_aborted_request_counts_once_and_is_forgotten(metrics: Metrics) -> None:
    sampling = SamplingParams(max_tokens=7)
    metrics.on_accepted(Request(id="a", prompt=pack_ids((1,)), sampling=sampling), 20.0)
    metrics.on_output(output(0, 0, FinishReason.ABORT), 21.0)
    assert value(metrics, "vllm:request_success_total", finished_reason="abort") == 1
    assert value(metrics, "vllm:time_to_first_token_seconds_count") == 1
    metrics.on_rejected("overloaded", 3)
    assert value(metrics, "serve:requests_rejected_total", reason="overloaded") == 3


def test_replicas_have_their_own_engine_label(metrics: Metrics) -> None:
    metrics.on_report(Report(1, ReplicaLoad(num_blocks=10, num_free_blocks=10, num_running=1)))
    assert value(metrics, "vllm:num_requests_running", engine="1") == 1
    assert value(metrics, "vllm:num_requests_running", engine="0") == 3
    assert value(metrics, "vllm:kv_cache_usage_perc", engine="1") == 0
    restarted = ReplicaLoad(num_blocks=100, num_preemptions=6)
    metrics.on_report(Report(0, restarted))
    assert value(metrics, "vllm:num_preemptions_total") == 6
