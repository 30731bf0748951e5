"""From a body's fields to ``SamplingParams``; what is not served yet is refused by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from serve.api.body import Body, is_integer, is_number
from serve.api.errors import ApiError
from serve.api.settings import Api
from serve.config.sampling_defaults import RANGES
from serve.request import SamplingParams

MAX_STOPS = 64
MAX_STOP_CHARACTERS = 1024  # of one stop string: each new token is held against all of them
MAX_TOKEN_RULES = 1024  # entries of logit_bias and of stop_token_ids: each step reads them
_MAX_PENALTY = 2.0
_MAX_BIAS = 100.0


def _is_off(value: Any) -> bool:
    return value is False or value == [] or value == {}


def _is_unset(value: Any) -> bool:
    return value == "" or _is_off(value)


def _is_plain_text(value: Any) -> bool:
    return isinstance(value, dict) and value.get("type", "text") == "text"


# Features of the API that are not served, and what leaves them unused.
_UNSUPPORTED: dict[str, Callable[[Any], bool]] = {
    "echo": _is_off,
    "logprobs": lambda value: value is False,
    "top_logprobs": lambda value: value == 0,
    "prompt_logprobs": lambda value: False,
    "tools": _is_off,
    "tool_choice": lambda value: value in ("none", "auto"),
    "functions": _is_off,
    "function_call": lambda value: value in ("none", "auto"),
    "response_format": _is_plain_text,
    "suffix": lambda value: value == "",
    "use_beam_search": _is_off,
    "length_penalty": lambda value: value == 1.0,
    "audio": lambda value: False,
    "structured_outputs": _is_off,
    "guided_json": lambda value: False,
    "guided_regex": lambda value: False,
    "guided_choice": _is_off,
    "guided_grammar": lambda value: False,
    "guided_json_object": _is_off,
    "allowed_token_ids": lambda value: False,
    "bad_words": _is_off,
    "truncate_prompt_tokens": lambda value: False,
    "prompt_embeds": lambda value: False,
    "kv_transfer_params": lambda value: False,
    "continue_final_message": _is_off,
    "chat_template": lambda value: False,
    "documents": _is_off,
    "logprob_token_ids": _is_off,
    "thinking_token_budget": lambda value: False,
    "repetition_detection": lambda value: False,
    "return_tokens_as_token_ids": _is_off,
    "spaces_between_special_tokens": lambda value: value is True,
    "regex": _is_unset,
    "ebnf": _is_unset,
    "json_schema": _is_unset,
    "structural_tag": _is_unset,
    "stop_regex": _is_unset,
    "no_stop_trim": _is_off,
    "lora_path": _is_unset,
    "input_embeds": lambda value: False,
    "return_hidden_states": _is_off,
    "return_prompt_text": _is_off,
    "logits_processors": _is_off,
}


def refuse_unsupported(body: Body) -> None:
    """400 for the first field that asks for what is not served."""
    for name, is_unused in _UNSUPPORTED.items():
        value = body.get(name)
        if value is not None and not is_unused(value):
            raise ApiError(f"{name} is not supported by this server", param=name)
    best_of = body.integer("best_of", 0)
    if best_of not in (0, 1, body.integer("n", 1)):
        raise ApiError("best_of is not supported by this server", param="best_of")


def read_sampling(body: Body, api: Api, max_tokens: int) -> SamplingParams:
    """The parameters of all prompts, before ``max_tokens`` is cut to what a context leaves."""
    defaults = api.settings.sampling
    top_k = body.integer("top_k", defaults.top_k, low=-1)
    return SamplingParams(
        max_tokens=max_tokens,
        seed=body.integer("seed", 0),
        temperature=body.number("temperature", defaults.temperature, *RANGES["temperature"]),
        top_p=_top_p(body, defaults.top_p),
        top_k=min(max(0, top_k), api.settings.vocab_size),
        min_p=body.number("min_p", defaults.min_p, *RANGES["min_p"]),
        presence_penalty=body.number("presence_penalty", 0.0, -_MAX_PENALTY, _MAX_PENALTY),
        frequency_penalty=body.number("frequency_penalty", 0.0, -_MAX_PENALTY, _MAX_PENALTY),
        repetition_penalty=_repetition_penalty(body, defaults.repetition_penalty),
        logit_bias=_logit_bias(body, api.settings.vocab_size),
        stop=_stop(body, api),
        stop_token_ids=_stop_token_ids(body, api.settings.vocab_size),
        include_stop_str_in_output=body.boolean("include_stop_str_in_output"),
        skip_special_tokens=body.boolean("skip_special_tokens", True),
        ignore_eos=body.boolean("ignore_eos"),
        min_tokens=body.integer("min_tokens", 0, low=0),
    )


def read_max_tokens(body: Body, default: int) -> int:
    """``max_completion_tokens`` or ``max_tokens``; checked against ``min_tokens``."""
    limit = body.integer("max_tokens", default, low=1)
    limit = body.integer("max_completion_tokens", limit, low=1)
    if body.integer("min_tokens", 0, low=0) > limit:
        raise ApiError(f"min_tokens must not exceed max_tokens, {limit}", param="min_tokens")
    return limit


def _top_p(body: Body, default: float) -> float:
    top_p = body.number("top_p", default, *RANGES["top_p"])
    if top_p == 0.0:
        raise ApiError("top_p must be in (0, 1], got 0", param="top_p")
    return top_p


def _repetition_penalty(body: Body, default: float) -> float:
    penalty = body.number("repetition_penalty", default, *RANGES["repetition_penalty"])
    if penalty == 0.0:
        raise ApiError("repetition_penalty must be above 0", param="repetition_penalty")
    return penalty


def _logit_bias(body: Body, vocab_size: int) -> dict[int, float]:
    bias: dict[int, float] = {}
    given = body.mapping("logit_bias")
    if len(given) > MAX_TOKEN_RULES:
        raise ApiError(f"logit_bias may have {MAX_TOKEN_RULES} entries", param="logit_bias")
    for key, value in given.items():
        if not (key.isascii() and key.isdecimal() and len(key) < 20 and int(key) < vocab_size):
            raise ApiError(
                f"logit_bias has the key {key[:40]!r}, which is no token id below {vocab_size}",
                param="logit_bias",
            )
        if not is_number(value) or not -_MAX_BIAS <= value <= _MAX_BIAS:
            raise ApiError("logit_bias must have values in [-100, 100]", param="logit_bias")
        bias[int(key)] = float(value)
    return bias


def _stop(body: Body, api: Api) -> tuple[str, ...]:
    value = body.get("stop")
    if value is None or value == []:
        return ()
    stops = [value] if isinstance(value, str) else value
    if isinstance(stops, list) and len(stops) > MAX_STOPS:
        raise ApiError(f"stop must have at most {MAX_STOPS} strings", param="stop")
    if not isinstance(stops, list) or not all(isinstance(s, str) and s for s in stops):
        raise ApiError("stop must be a string or a list of strings, none empty", param="stop")
    if any(len(stop) > MAX_STOP_CHARACTERS for stop in stops):
        raise ApiError(f"a stop string may have {MAX_STOP_CHARACTERS} characters", param="stop")
    if api.tokenizer is None:
        raise ApiError("stop needs a tokenizer, and the server runs without one", param="stop")
    return tuple(stops)


def _stop_token_ids(body: Body, vocab_size: int) -> tuple[int, ...]:
    value = body.get("stop_token_ids")
    if value is None:
        return ()
    if isinstance(value, list) and len(value) > MAX_TOKEN_RULES:
        raise ApiError(f"stop_token_ids may have {MAX_TOKEN_RULES} ids", param="stop_token_ids")
    if not isinstance(value, list) or not all(is_integer(i) and 0 <= i < vocab_size for i in value):
        raise ApiError(
            f"stop_token_ids must be a list of token ids below {vocab_size}",
            param="stop_token_ids",
        )
    return tuple(value)
