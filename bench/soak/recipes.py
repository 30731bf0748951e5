"""Recipes: the requests of a soak, drawn from a seed, and the rules that each answer must meet."""

from __future__ import annotations

import random
import string
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
MAX_TOKENS = 24
MAX_PROMPT_TOKENS = 60
_NUM_BYTES = 256  # ids that are single bytes in the soak's own tokenizer


@dataclass(frozen=True, slots=True)
class Recipe:
    """One request. It fixes the answer: greedy, or sampled with a seed of its own."""

    number: int  # among the recipes of the run
    path: str
    body: dict[str, Any]  # without ``stream``

    @property
    def n(self) -> int:
        return int(self.body.get("n", 1))

    @property
    def max_tokens(self) -> int:
        return int(self.body["max_tokens"])

    @property
    def runs_to_length(self) -> bool:
        """Whether nothing but ``max_tokens`` ends the answer."""
        stops = self.body.get("stop") or self.body.get("stop_token_ids")
        return bool(self.body.get("ignore_eos")) and not stops


def draw_recipes(rng: random.Random, count: int) -> tuple[Recipe, ...]:
    """Draw ``count`` different requests."""
    return tuple(_draw(rng, number) for number in range(count))


def greedy(rng: random.Random, max_tokens: int, n: int = 1) -> dict[str, Any]:
    """Draw the body of a greedy completion that runs to ``max_tokens``."""
    return {
        "prompt": _ids(rng, MAX_PROMPT_TOKENS),
        "max_tokens": max_tokens,
        "temperature": 0.0,
        "ignore_eos": True,
        "return_token_ids": True,
        "n": n,
    }


def _draw(rng: random.Random, number: int) -> Recipe:
    body: dict[str, Any] = {
        "max_tokens": rng.randint(1, MAX_TOKENS),
        "ignore_eos": rng.random() < 0.6,
        "return_token_ids": True,
        "temperature": 0.0,
    }
    path = COMPLETIONS
    kind = rng.choices(("ids", "text", "chat"), (60, 20, 20))[0]
    if kind == "ids":
        body["prompt"] = _ids(rng, MAX_PROMPT_TOKENS)
    elif kind == "text":
        body["prompt"] = _text(rng)
    else:
        path, body["messages"] = CHAT, [{"role": "user", "content": _text(rng)}]
    if rng.random() < 0.15:
        body["n"] = rng.randint(2, 3)
    if rng.random() < 0.5:
        body |= _sampling(rng)
    if rng.random() < 0.3:
        body |= _stops(rng)
    return Recipe(number, path, body)


def _sampling(rng: random.Random) -> dict[str, Any]:
    """Draw sampling parameters, with a seed, because only then the answer is fixed."""
    every = {
        "top_p": rng.uniform(0.3, 1.0),
        "top_k": rng.randint(1, 100),
        "min_p": rng.uniform(0.0, 0.2),
        "presence_penalty": rng.uniform(-2.0, 2.0),
        "frequency_penalty": rng.uniform(-2.0, 2.0),
        "repetition_penalty": rng.uniform(0.8, 1.5),
        "logit_bias": {
            str(rng.randrange(_NUM_BYTES)): rng.uniform(-20, 5) for _ in range(rng.randint(1, 40))
        },
    }
    chosen = rng.sample(sorted(every), rng.randint(0, 4))
    seeded = {"seed": rng.randrange(2**31), "temperature": rng.uniform(0.2, 1.5)}
    return seeded | {name: every[name] for name in chosen}


def _stops(rng: random.Random) -> dict[str, Any]:
    if rng.random() < 0.5:
        found: dict[str, Any] = {"stop": rng.sample(string.ascii_letters, rng.randint(1, 8))}
    else:
        found = {"stop_token_ids": rng.sample(range(_NUM_BYTES), rng.randint(1, 8))}
    if rng.random() < 0.3:
        found["include_stop_str_in_output"] = True
    return found


def _ids(rng: random.Random, longest: int) -> list[int]:
    return [rng.randrange(_NUM_BYTES) for _ in range(rng.randint(1, longest))]


def _text(rng: random.Random) -> str:
    return "".join(rng.choices(string.ascii_letters + "  éß漢🙂", k=rng.randint(1, 30)))


# Bodies that are refused with the status beside them, whatever the model.
MALFORMED: Sequence[tuple[str, bytes, int]] = (
    (COMPLETIONS, b"", 400),
    (COMPLETIONS, b"{", 400),
    (COMPLETIONS, b"[1, 2]", 400),
    (COMPLETIONS, b"\xff\xfe{}", 400),
    (COMPLETIONS, b'{"prompt": []}', 400),
    (COMPLETIONS, b'{"prompt": [-1]}', 400),
    (COMPLETIONS, b'{"prompt": [1000000000]}', 400),
    (COMPLETIONS, b'{"prompt": [1], "max_tokens": 0}', 400),
    (COMPLETIONS, b'{"prompt": [1], "temperature": "hot"}', 400),
    (COMPLETIONS, b'{"prompt": [1], "n": 1000000}', 400),
    (COMPLETIONS, b'{"prompt": [1], "logprobs": 3}', 400),
    (COMPLETIONS, b'{"prompt": [1], "stop": [""]}', 400),
    (COMPLETIONS, b'{"prompt": [1], "model": "another"}', 404),
    (COMPLETIONS, b'{"prompt": ' + b"[" * 3000 + b"}", 400),
    (CHAT, b'{"messages": []}', 400),
    (CHAT, b'{"messages": [{"role": 5}]}', 400),
    (CHAT, b'{"messages": [{"role": "user", "content": "x"}], "tools": [{}]}', 400),
    ("/v1/nothing", b"{}", 404),
    ("/detokenize", b'{"tokens": [-5]}', 400),
)

# Fields that are not ours: they change nothing.
UNKNOWN_FIELDS: dict[str, Any] = {
    "user": "soak",
    "metadata": {"a": [[], [[]], {}]},
    "x": [[] for _ in range(200)],
}
