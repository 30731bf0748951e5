"""What a request asks for: sampling as it reaches the service, and token ids in its answer."""

from __future__ import annotations

from typing import Any

import pytest

from serve.config.sampling_defaults import SamplingDefaults
from tests.api.test_bodies import CHAT, COMPLETIONS, PLAIN, post
from tests.support.fake_front import text


async def test_sampling_arrives_as_asked() -> None:
    asked: dict[str, Any] = {
        "temperature": 0.5, "top_p": 0.9, "top_k": 5, "min_p": 0.1, "presence_penalty": 1.0,
        "frequency_penalty": -1.0, "repetition_penalty": 1.2, "seed": -5, "stop_token_ids": [7],
        "ignore_eos": True, "min_tokens": 2, "skip_special_tokens": False,
        "include_stop_str_in_output": True,
    }  # fmt: skip
    extra: dict[str, Any] = {"stop": "zz", "logit_bias": {"5": -100, "7": 3.5}, "max_tokens": 3}
    status, body, service = await post({"prompt": "hi"} | asked | extra)
    assert status == 200, body
    [request] = service.requests
    sampling = request.sampling
    for name, value in asked.items():
        got = getattr(sampling, name)
        assert (list(got) if isinstance(got, tuple) else got) == value, name
    assert sampling.stop == ("zz",)
    assert sampling.logit_bias == {5: -100.0, 7: 3.5}


async def test_missing_fields_are_as_the_model_recommends() -> None:
    recommended: dict[str, Any] = {
        "temperature": 0.6, "top_p": 0.8, "top_k": 20, "min_p": 0.05, "repetition_penalty": 1.05,
    }  # fmt: skip
    settings = {"sampling": SamplingDefaults(**recommended)}
    fields: dict[str, Any]
    for fields in ({}, {"temperature": 0, "top_k": -1}, {"top_p": None, "repetition_penalty": 1.0}):
        for path, prompt in ((COMPLETIONS, {"prompt": "hi"}), (CHAT, {"messages": PLAIN})):
            _, _, service = await post({"max_tokens": 2} | prompt | fields, path, **settings)
            sampling = service.requests[0].sampling
            chosen = {name: value for name, value in fields.items() if value is not None}
            for name, value in (recommended | chosen).items():
                assert getattr(sampling, name) == max(0, value), name
            assert sampling.presence_penalty == sampling.frequency_penalty == 0.0


@pytest.mark.parametrize(
    ("recommended", "fields", "completion", "chat"),
    [
        (None, {}, 16, 2048),
        (None, {"max_tokens": None}, 16, 2048),
        (300, {}, 300, 300),
        (300, {"max_tokens": None}, 300, 300),
        (300, {"max_tokens": 400}, 400, 400),
        (300, {"max_completion_tokens": 7}, 7, 7),
        (10**6, {}, 2048, 2048),
    ],
)
async def test_max_tokens_is_the_models_if_missing(
    recommended: int | None, fields: dict[str, Any], completion: int, chat: int
) -> None:
    settings = {"sampling": SamplingDefaults(max_tokens=recommended)}
    for path, prompt, expected in (
        (COMPLETIONS, {"prompt": "hi"}, completion),
        (CHAT, {"messages": PLAIN}, chat),
    ):
        _, _, service = await post(prompt | fields, path, **settings)
        [request] = service.requests
        room = 2048 - len(request.prompt_ids)
        assert request.sampling.max_tokens == min(expected, room)


async def test_max_tokens_is_cut_to_the_context() -> None:
    _, _, service = await post({"prompt": "hi", "max_tokens": 10**9, "stop_token_ids": [97, 98]})
    assert service.requests[0].sampling.max_tokens == 2046


async def test_the_largest_seed_and_n() -> None:
    _, _, service = await post({"prompt": "hi", "seed": 2**63 - 1, "n": 2, "max_tokens": 1})
    seeds = [request.sampling.seed for request in service.requests]
    assert len(set(seeds)) == 2
    assert all(-(2**63) <= seed < 2**63 for seed in seeds)


async def test_token_ids_and_timeline_in_an_answer() -> None:
    ask = {"max_tokens": 3, "return_token_ids": True, "return_timeline": True}
    for path, prompt in ((COMPLETIONS, {"prompt": [9, 8]}), (CHAT, {"messages": PLAIN})):
        _, body, service = await post(ask | prompt, path)
        [choice], [request] = body["choices"], service.requests
        assert choice["prompt_token_ids"] == list(request.prompt_ids)
        assert bytes(choice["token_ids"]).decode() == text(request, 3)
        assert choice["timeline"] == {"arrived_s": 1.0, "finished_s": 2.5}


async def test_token_ids_and_timeline_in_a_stream() -> None:
    ask = {"max_tokens": 3, "return_token_ids": True, "return_timeline": True, "stream": True}
    for path, prompt in ((COMPLETIONS, {"prompt": [9, 8]}), (CHAT, {"messages": PLAIN})):
        _, chunks, service = await post(ask | prompt, path)
        choices, [request] = [chunk["choices"][0] for chunk in chunks], service.requests
        prompts = [c["prompt_token_ids"] for c in choices if c.get("prompt_token_ids")]
        assert prompts == [list(request.prompt_ids)]
        ids = [token_id for choice in choices for token_id in choice.get("token_ids") or ()]
        assert bytes(ids).decode() == text(request, 3)
        assert [c["timeline"] for c in choices if "timeline" in c] == [
            {"arrived_s": 1.0, "finished_s": 2.5}
        ]


async def test_every_token_makes_a_chunk_even_without_text() -> None:
    # Every text may be the beginning of this stop string, so no text is sent before the end.
    stop = "abcdefghijklmnopqrstuvwxyz"
    ask = {"prompt": "hi", "max_tokens": 4, "stream": True, "temperature": 0, "stop": [stop]}
    _, chunks, _ = await post(ask | {"logit_bias": {}})
    assert len(chunks) == 4
    assert sum(chunk["choices"][0]["finish_reason"] is not None for chunk in chunks) == 1
