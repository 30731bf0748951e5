"""Sampling fields given in Python: the model's defaults below them, and refusals that name them."""

from __future__ import annotations

import math
from typing import Any

import pytest

from serve.api.sampling_params import sampling_from_keywords
from serve.config.sampling_defaults import SamplingDefaults
from serve.request import SamplingParams

VOCAB_SIZE = 128
DEFAULTS = SamplingDefaults(temperature=0.7, top_p=0.8, top_k=20, repetition_penalty=1.1)


def sample(**fields: Any) -> SamplingParams:
    return sampling_from_keywords(
        fields, DEFAULTS, max_tokens=16, vocab_size=VOCAB_SIZE, has_tokenizer=True
    )


def test_fields_lie_on_top_of_the_models_defaults() -> None:
    assert sample() == SamplingParams(
        max_tokens=16, temperature=0.7, top_p=0.8, top_k=20, repetition_penalty=1.1
    )
    assert sample(temperature=0, top_p=None, seed=3) == SamplingParams(
        max_tokens=16, temperature=0.0, top_p=0.8, top_k=20, repetition_penalty=1.1, seed=3
    )


def test_the_models_max_tokens_is_below_a_given_one() -> None:
    defaults = SamplingDefaults(max_tokens=300)
    for fields, expected in (({}, 300), ({"max_tokens": 5}, 5), ({"max_tokens": None}, 300)):
        made = sampling_from_keywords(
            fields, defaults, max_tokens=16, vocab_size=VOCAB_SIZE, has_tokenizer=True
        )
        assert made.max_tokens == expected


EVERY_FIELD: dict[str, Any] = {
    "max_tokens": 9, "seed": -5, "temperature": 0.5, "top_p": 0.4, "top_k": 3, "min_p": 0.1,
    "presence_penalty": 1.0, "frequency_penalty": -1.0, "repetition_penalty": 1.3,
    "logit_bias": {5: 2.0}, "stop": ("a", "b"), "stop_token_ids": (1, 2),
    "include_stop_str_in_output": True, "skip_special_tokens": False, "ignore_eos": True,
    "min_tokens": 2,
}  # fmt: skip


def test_every_field_can_be_given() -> None:
    assert set(EVERY_FIELD) == set(SamplingParams.__struct_fields__)
    assert sample(**EVERY_FIELD) == SamplingParams(**EVERY_FIELD)


def test_forms_that_are_taken_as_well() -> None:
    assert sample(stop="end").stop == ("end",)
    assert sample(stop=["end", "."]).stop == ("end", ".")
    assert sample(stop_token_ids=[3]).stop_token_ids == (3,)
    assert sample(top_k=-1).top_k == 0
    assert sample(top_k=10_000).top_k == VOCAB_SIZE


@pytest.mark.parametrize("name", ["tempreature", "n", "prompt"])
def test_an_unknown_field_is_a_type_error(name: str) -> None:
    with pytest.raises(TypeError, match=name):
        sample(**{name: 1})


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("max_tokens", 0), ("max_tokens", 1.5), ("max_tokens", True),
        ("min_tokens", -1),
        ("min_tokens", 17), ("seed", 2**63), ("seed", "x"), ("temperature", -0.1),
        ("temperature", 2.1), ("temperature", math.nan), ("temperature", "hot"), ("top_p", 0),
        ("top_p", 1.1), ("top_k", -2), ("min_p", 1.5), ("presence_penalty", 2.5),
        ("frequency_penalty", -2.5), ("repetition_penalty", 0.0), ("repetition_penalty", math.inf),
        ("logit_bias", {VOCAB_SIZE: 1.0}), ("logit_bias", {-1: 1.0}), ("logit_bias", {1: 101.0}),
        ("logit_bias", {1: math.nan}), ("stop", ""), ("stop", ["a", ""]), ("stop", [3]),
        ("stop_token_ids", [VOCAB_SIZE]), ("stop_token_ids", 3), ("ignore_eos", 1),
    ],
)  # fmt: skip
def test_a_bad_value_is_a_value_error_of_one_line(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=name) as raised:
        sample(**{name: value})
    assert "\n" not in str(raised.value)


def test_stop_needs_a_tokenizer() -> None:
    with pytest.raises(ValueError, match="stop needs a tokenizer"):
        sampling_from_keywords(
            {"stop": "x"}, DEFAULTS, max_tokens=16, vocab_size=VOCAB_SIZE, has_tokenizer=False
        )
