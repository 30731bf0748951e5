"""Request structs: each wrong value is one line that names its field; null is a default."""

from __future__ import annotations

from typing import Any

import pytest

from serve.api.sampling_params import make_sampling_params
from serve.api.schemas import (
    ChatCompletionRequest,
    ChatMessage,
    CompletionRequest,
    GenerationRequest,
    SamplingFields,
    TokenizeRequest,
)
from serve.api.unsupported import refuse_unsupported
from serve.api.validation import InvalidField, to_struct
from serve.config.sampling_defaults import SamplingDefaults

STOP = "stop must be a string or a list of at most 64 strings, each of 1 to 1024 characters"
STOP_TOKEN_IDS = "stop_token_ids must be a list of at most 1024 token ids"
LOGIT_BIAS = (
    "logit_bias must be an object of at most 1024 token ids, each with a number in [-100, 100]"
)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("temperature", 3, "temperature must be in [0, 2], got 3"),
        ("temperature", -0.5, "temperature must be in [0, 2], got -0.5"),
        ("temperature", "1", "temperature must be a finite number"),
        ("temperature", True, "temperature must be a finite number"),
        ("top_p", 0, "top_p must be in (0, 1], got 0"),
        ("top_p", 1.5, "top_p must be in (0, 1], got 1.5"),
        ("top_k", 0.5, "top_k must be an integer"),
        ("repetition_penalty", 0, "repetition_penalty must be in (0, 1000], got 0"),
        ("presence_penalty", 2.5, "presence_penalty must be in [-2, 2], got 2.5"),
        ("n", 129, "n must be in [1, 128], got 129"),
        ("n", 1.0, "n must be an integer"),
        ("n", False, "n must be an integer"),
        ("temperature", 10**400, "temperature must be in [0, 2], got 1" + "0" * 39 + "..."),
        ("model", 5, "model must be a string"),
        ("stream", "yes", "stream must be a boolean"),
        ("stream_options", [], "stream_options must be an object"),
        ("stop", 5, f"{STOP}: it is 5"),
        ("stop", ["a", ""], f'{STOP}: stop[1] is ""'),
        ("stop", ["a"] * 65, f"{STOP}: it has 65 entries"),
        ("stop", "a" * 1025, f"{STOP}: it has 1025 characters"),
        ("stop", ["b", "a" * 1025], f'{STOP}: stop[1] is "{"a" * 40}...", of 1025 characters'),
        ("stop", {}, f"{STOP}: it is an object"),
        ("stop_token_ids", [True], f"{STOP_TOKEN_IDS}: stop_token_ids[0] is true"),
        ("stop_token_ids", [3, -1], f"{STOP_TOKEN_IDS}: stop_token_ids[1] is -1"),
        ("logit_bias", {"5": 1, "x": 1}, f'{LOGIT_BIAS}: entry "x" is 1'),
        ("logit_bias", {"2": 0, "1": 101}, f'{LOGIT_BIAS}: entry "1" is 101'),
        ("logit_bias", {"1": None}, f'{LOGIT_BIAS}: entry "1" is null'),
        ("logit_bias", [1], f"{LOGIT_BIAS}: it is a list"),
        ("logit_bias", {str(i): 0 for i in range(1025)}, f"{LOGIT_BIAS}: it has 1025 entries"),
        ("prompt", None, "prompt is required"),
        ("best_of", 3, "best_of is not supported by this server"),
    ],
)
def test_wrong_values(name: str, value: object, message: str) -> None:
    with pytest.raises(InvalidField) as caught:
        to_struct({"prompt": "x", name: value}, CompletionRequest)
    assert str(caught.value) == message
    assert caught.value.param == name


def test_fields_of_an_inner_object_are_named() -> None:
    fields = {"prompt": "x", "stream": True, "stream_options": {"include_usage": 1}}
    with pytest.raises(InvalidField, match=r"^include_usage must be a boolean$") as caught:
        to_struct(fields, CompletionRequest)
    assert caught.value.param == "include_usage"


@pytest.mark.parametrize(
    "part",
    [5, {}, {"text": "x"}, {"type": "text"}, {"type": "image_url"}, {"type": "text", "text": 5}],
)
def test_parts_must_be_text(part: object) -> None:
    with pytest.raises(InvalidField, match=r"^content must be a string or a list of parts of type"):
        to_struct({"role": "user", "content": [part]}, ChatMessage)


@pytest.mark.parametrize(
    ("kind", "needed"),
    [
        (CompletionRequest, {"prompt": "x"}),
        (ChatCompletionRequest, {"messages": [1]}),
        (TokenizeRequest, {"prompt": "x"}),
    ],
)
def test_null_is_the_default(kind: type[Any], needed: dict[str, Any]) -> None:
    nulls = dict.fromkeys(kind.__struct_fields__)
    assert to_struct(nulls | needed, kind) == to_struct(needed, kind)


def test_unknown_fields_are_skipped() -> None:
    assert to_struct({"prompt": "x", "unknown": [{}]}, CompletionRequest).prompt == "x"


def test_long_lists_are_not_copied() -> None:
    ids = list(range(100_000))
    assert to_struct({"prompt": ids}, CompletionRequest).prompt is ids


def test_fields_are_either_served_or_refused() -> None:
    for kind in (CompletionRequest, ChatCompletionRequest):
        for name in kind.__struct_fields__:
            refuse_unsupported({name: object()})
    with pytest.raises(InvalidField, match=r"^logprobs is not supported by this server$"):
        refuse_unsupported({"prompt": "x", "echo": False, "logprobs": 0})


def make(fields: dict[str, Any], *, has_tokenizer: bool = True) -> Any:
    return make_sampling_params(
        to_struct(fields, SamplingFields), SamplingDefaults(temperature=0.6, top_k=20),
        max_tokens=8, vocab_size=100, has_tokenizer=has_tokenizer,
    )  # fmt: skip


def test_what_is_left_open_comes_from_the_model() -> None:
    params = make({})
    assert (params.temperature, params.top_k, params.max_tokens, params.seed) == (0.6, 20, 8, 0)
    params = make({"temperature": 0, "top_k": -1, "max_tokens": 5, "max_completion_tokens": 3})
    assert (params.temperature, params.top_k, params.max_tokens) == (0.0, 0, 3)
    assert make({"top_k": 1000}).top_k == 100


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"min_tokens": 9}, "min_tokens must not exceed max_tokens, 8"),
        ({"stop_token_ids": [100]}, "stop_token_ids must have token ids below 100, got 100"),
        ({"logit_bias": {"100": 1}}, "logit_bias must have token ids below 100, got 100"),
        ({"stop": "x"}, "stop needs a tokenizer, and the server runs without one"),
    ],
)
def test_values_that_the_model_cannot_serve(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidField) as caught:
        make(fields, has_tokenizer=False)
    assert str(caught.value) == message
    assert caught.value.param == next(iter(fields))


def test_usage_is_streamed_only_as_requested() -> None:
    def read(**options: Any) -> GenerationRequest:
        fields = {"prompt": "x", "stream": True, "stream_options": options}
        return to_struct(fields, CompletionRequest)

    assert not read(continuous_usage_stats=True).continuous_usage, "without include_usage"
    assert read(include_usage=True, continuous_usage_stats=True).continuous_usage
    assert read(include_usage=True).include_usage
    assert not read(include_usage=None).include_usage
