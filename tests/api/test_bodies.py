"""Request bodies: those of known clients, extensions, neutral values, refusals by name."""

from __future__ import annotations

import json
from typing import Any

import aiohttp
import pytest

from tests.support.fake_front import FakeService, FakeTokenizer, serving

PARTS = [{"role": "user", "content": [{"type": "text", "text": "hi"}]}]
PLAIN = [{"role": "user", "content": "hi"}]
USAGE = {"include_usage": True, "continuous_usage_stats": True}
COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"

# Bodies recorded from clients.
RECORDED: list[tuple[str, dict[str, Any]]] = [
    (CHAT, {"model": "alias", "messages": PARTS, "stream": True, "stream_options": USAGE,
            "max_completion_tokens": 4, "max_tokens": 4, "ignore_eos": True, "stop": None}),
    (COMPLETIONS, {"model": "alias", "prompt": "hi", "stream": True, "stream_options": USAGE,
                   "max_tokens": 4, "ignore_eos": True}),
    (CHAT, {"model": "alias", "messages": PLAIN, "stream": True, "max_completion_tokens": 4,
            "stream_options": {"include_usage": True}, "ignore_eos": True}),
    (COMPLETIONS, {"model": "alias", "prompt": [1, 2, 3], "temperature": 0.0, "max_tokens": 4,
                   "repetition_penalty": 1.0, "logprobs": None, "stream": True,
                   "stream_options": {"include_usage": True}}),
    (COMPLETIONS, {"model": "alias", "prompt": "hi", "temperature": 0.0, "best_of": 1,
                   "max_tokens": 4, "stream": True, "ignore_eos": True}),
    (COMPLETIONS, {"model": "alias", "prompt": [[1, 2], [3]], "max_tokens": 4, "seed": 1234,
                   "stop": ["\n\n", "</s>"], "temperature": 0}),
    (CHAT, {"model": "alias", "messages": PLAIN, "max_tokens": 4, "stop": ["</s>"], "seed": 1234,
            "temperature": 0}),
    (CHAT, {"model": "alias", "messages": PLAIN, "max_completion_tokens": 4, "stream": False}),
    (COMPLETIONS, {"model": "alias", "prompt": ["hi"], "logprobs": None, "seed": None, "n": 1,
                   "frequency_penalty": 0, "presence_penalty": 0, "top_p": 1, "max_tokens": 4,
                   "temperature": 0.7, "logit_bias": {}, "user": "me"}),
    (CHAT, {"messages": PLAIN, "max_tokens": 4, "metadata": {"a": "b"}, "store": False,
            "service_tier": "auto", "prompt_cache_key": "k", "safety_identifier": "s",
            "verbosity": "low", "reasoning_effort": "low", "modalities": ["text"],
            "prediction": None, "web_search_options": {}, "parallel_tool_calls": True,
            "request_id": "x", "session_id": "x", "cache_salt": "x", "priority": 0, "any": [{}]}),
]  # fmt: skip


async def post(
    ask: dict[str, Any], path: str = COMPLETIONS, **settings: Any
) -> tuple[int, Any, FakeService]:
    """Return the status, the body (for a stream the list of its events) and the service."""
    service = FakeService()
    async with (
        serving(service, FakeTokenizer(), **settings) as url,
        aiohttp.ClientSession(url) as http,
        http.post(path, json=ask) as answer,
    ):
        if answer.content_type != "text/event-stream":
            return answer.status, await answer.json(), service
        events = (await answer.text()).split("\n\n")
    assert events[-2:] == ["data: [DONE]", ""]
    return 200, [json.loads(event.removeprefix("data: ")) for event in events[:-2]], service


@pytest.mark.parametrize(("path", "ask"), RECORDED)
async def test_recorded_bodies(path: str, ask: dict[str, Any]) -> None:
    status, body, service = await post(ask, path)
    assert status == 200, body
    assert all(request.sampling.max_tokens == 4 for request in service.requests)
    asked = ask.get("stream_options") or {}
    if asked.get("include_usage"):
        assert body[-1]["choices"] == []
        assert body[-1]["usage"]["completion_tokens"] == 4
        running = [chunk["usage"]["completion_tokens"] for chunk in body[:-1] if "usage" in chunk]
        assert running == (sorted(running) if asked.get("continuous_usage_stats") else [])
    elif ask.get("stream"):
        assert all(chunk.get("usage") is None for chunk in body)


NULLABLE = [
    "model",
    "stream",
    "stream_options",
    "max_tokens",
    "max_completion_tokens",
    "n",
    "seed",
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "presence_penalty",
    "frequency_penalty",
    "repetition_penalty",
    "logit_bias",
    "stop",
    "stop_token_ids",
    "include_stop_str_in_output",
    "skip_special_tokens",
    "ignore_eos",
    "min_tokens",
    "return_token_ids",
    "return_timeline",
    "add_special_tokens",
    "add_generation_prompt",
    "chat_template_kwargs",
    "best_of",
    "echo",
    "logprobs",
    "top_logprobs",
    "prompt_logprobs",
    "tools",
    "tool_choice",
    "functions",
    "function_call",
    "response_format",
    "suffix",
    "use_beam_search",
    "audio",
    "structured_outputs",
    "guided_json",
    "allowed_token_ids",
    "bad_words",
    "truncate_prompt_tokens",
    "prompt_embeds",
    "kv_transfer_params",
    "user",
]


async def test_null_is_the_default_everywhere() -> None:
    nulls = dict.fromkeys(NULLABLE)
    status, body, service = await post(nulls | {"prompt": "hi"})
    assert status == 200, body
    _, _, plain = await post({"prompt": "hi"})
    assert service.requests[0].sampling == plain.requests[0].sampling
    status, body, _ = await post(nulls | {"messages": PLAIN}, CHAT)
    assert status == 200, body


@pytest.mark.parametrize(
    "neutral",
    [
        {"echo": False}, {"logprobs": False}, {"top_logprobs": 0}, {"tools": []},
        {"tool_choice": "none"}, {"tool_choice": "auto"}, {"functions": []},
        {"response_format": {"type": "text"}}, {"suffix": ""}, {"use_beam_search": False},
        {"length_penalty": 1}, {"best_of": 2, "n": 2}, {"best_of": 1}, {"bad_words": []},
        {"continue_final_message": False}, {"stream_options": {}}, {"stop": []}, {"top_k": 0},
        {"top_k": -1}, {"stop_token_ids": []}, {"chat_template_kwargs": {}},
        {"return_tokens_as_token_ids": False}, {"spaces_between_special_tokens": True},
    ],
)  # fmt: skip
async def test_neutral_values_are_accepted(neutral: dict[str, Any]) -> None:
    for path, ask in ((COMPLETIONS, {"prompt": "hi"}), (CHAT, {"messages": PLAIN})):
        status, body, _ = await post(ask | neutral | {"max_tokens": 2}, path)
        assert status == 200, body


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("echo", True), ("logprobs", True), ("logprobs", 0), ("logprobs", 5),
        ("top_logprobs", 3), ("prompt_logprobs", 0), ("tools", [{"type": "function"}]),
        ("tool_choice", "required"), ("tool_choice", {"type": "function"}),
        ("functions", [{"name": "f"}]), ("response_format", {"type": "json_object"}),
        ("response_format", "text"), ("suffix", "x"), ("best_of", 3), ("use_beam_search", True),
        ("length_penalty", 2), ("audio", {}), ("structured_outputs", {"json": {}}),
        ("guided_json", {}), ("guided_regex", "a"), ("guided_choice", ["a"]),
        ("guided_grammar", "a"), ("allowed_token_ids", [1]), ("bad_words", ["a"]),
        ("truncate_prompt_tokens", 3), ("prompt_embeds", "x"),
        ("kv_transfer_params", {"do_remote_decode": True}), ("continue_final_message", True),
        ("chat_template", "x"), ("documents", [{}]), ("logprob_token_ids", [1]),
        ("regex", "a+"), ("ebnf", "x"), ("json_schema", "{}"), ("stop_regex", "a"),
        ("guided_json_object", True), ("logits_processors", ["x"]), ("return_prompt_text", True),
        ("return_hidden_states", True), ("lora_path", "x"), ("no_stop_trim", True),
        # wrong types and ranges
        ("model", 5), ("stream", "yes"), ("stream", 1), ("n", 0), ("n", 129), ("n", 1.5),
        ("n", True), ("max_tokens", 0), ("max_tokens", -1), ("max_tokens", "5"),
        ("max_completion_tokens", 0), ("min_tokens", -1), ("min_tokens", 10**6),
        ("temperature", -0.1), ("temperature", 2.1), ("temperature", "1"), ("top_p", 0),
        ("top_p", 1.1), ("top_k", -2), ("top_k", 0.5), ("min_p", -1), ("min_p", 1.1),
        ("presence_penalty", 2.1), ("frequency_penalty", -2.1), ("repetition_penalty", 0),
        ("repetition_penalty", -1), ("seed", 2**63), ("seed", 10**30), ("seed", "1"), ("seed", 1.5),
        ("logit_bias", []), ("logit_bias", {"x": 1}), ("logit_bias", {"300": 1}),
        ("logit_bias", {"-1": 1}), ("logit_bias", {"1": 101}), ("logit_bias", {"1": None}),
        ("logit_bias", {"٣": 1}), ("logit_bias", {"1" * 5000: 1}), ("stop", ""), ("stop", [""]),
        ("stop", 5), ("stop", [5]), ("stop", ["a"] * 1000), ("stop_token_ids", 5),
        ("stop_token_ids", ["5"]), ("stop_token_ids", [300]), ("stop_token_ids", [-1]),
        ("stop_token_ids", [True]), ("ignore_eos", "x"), ("skip_special_tokens", 0),
        ("include_stop_str_in_output", []), ("return_token_ids", "x"), ("return_timeline", 1),
        ("stream_options", {"include_usage": True}), ("stream_options", "x"),
    ],
)  # fmt: skip
async def test_the_rest_is_refused_by_name(field: str, value: object) -> None:
    for path, ask in ((COMPLETIONS, {"prompt": "hi"}), (CHAT, {"messages": PLAIN})):
        status, body, service = await post(ask | {field: value}, path)
        assert status == 400, body
        assert body["error"]["param"] == field
        assert body["error"]["type"] == "BadRequestError"
        assert not service.requests


@pytest.mark.parametrize(
    "prompt",
    [
        None, "", [], [[]], [""], 5, {}, True, [1, "a"], ["a", 1], [[1], "a"], [1, [2]], [1.5],
        [True], [-1], [300], [2**40], [10**30], [[1], []], [None], [[None]], [[[1]]],
    ],
)  # fmt: skip
async def test_wrong_prompts(prompt: object) -> None:
    status, body, service = await post({"prompt": prompt})
    assert status == 400, body
    assert body["error"]["param"] == "prompt", body
    assert not service.requests


@pytest.mark.parametrize(
    "messages",
    [
        None, [], "hi", {}, [5], [{}], [{"content": "a"}], [{"role": 5, "content": "a"}],
        [{"role": "user", "content": 5}], [{"role": "user", "content": [5]}],
        [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}],
        [{"role": "user", "content": [{"type": "text"}]}],
        [{"role": "user", "content": [{"type": "text", "text": 5}]}],
        [{"role": "assistant", "content": None, "tool_calls": [{"id": "x"}]}],
    ],
)  # fmt: skip
async def test_wrong_messages(messages: object) -> None:
    status, body, service = await post({"messages": messages}, CHAT)
    assert status == 400, body
    assert body["error"]["param"] == "messages", body
    assert not service.requests


@pytest.mark.parametrize(
    "kwargs",
    [
        {"refuse": "roles must alternate"}, {"messages": []}, {"add_generation_prompt": True},
        {"self": 1}, [1], "x",
    ],
)  # fmt: skip
async def test_a_refusal_of_the_template_is_400(kwargs: object) -> None:
    status, body, _ = await post({"messages": PLAIN, "chat_template_kwargs": kwargs}, CHAT)
    assert status == 400, body
    if kwargs == {"refuse": "roles must alternate"}:
        assert "roles must alternate" in body["error"]["message"]
