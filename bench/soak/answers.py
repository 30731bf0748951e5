"""Answers: what came back for a recipe, and the check that it is the right answer.

A recipe fixes its answer, so all answers to it must equal the first one, whether they came whole
or as a stream and whatever else the server did meanwhile. An answer that was cut off by the client
must be the beginning of it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from bench.soak.recipes import Recipe


class WrongAnswer(Exception):
    """The server answered something else than it should; the text says what."""


@dataclass(slots=True)
class Choice:
    """One choice of an answer, so far."""

    token_ids: list[int] = field(default_factory=list)
    text: str = ""
    finish_reasons: list[str] = field(default_factory=list)

    def add(self, entry: Mapping[str, Any]) -> None:
        """Add an entry of ``choices``, of a whole answer or of one event of a stream."""
        self.token_ids += entry.get("token_ids") or ()
        message = entry.get("message") or entry.get("delta") or {}
        self.text += entry.get("text") or message.get("content") or ""
        if entry.get("finish_reason") is not None:
            self.finish_reasons.append(entry["finish_reason"])


class Answer:
    """The choices of one answer by their index, and its usage if it had one."""

    def __init__(self) -> None:
        self.choices: dict[int, Choice] = {}
        self.completion_tokens: int | None = None

    def add(self, body: Mapping[str, Any]) -> None:
        """Add a whole answer or one event of a stream. Raises ``WrongAnswer`` for an error."""
        if "error" in body:
            raise WrongAnswer(f"an error where an answer was due: {body['error']}")
        for entry in body["choices"]:
            self.choices.setdefault(entry["index"], Choice()).add(entry)
        if body.get("usage"):
            self.completion_tokens = body["usage"]["completion_tokens"]


Fixed = tuple[tuple[tuple[int, ...], str, str], ...]  # ids, text, finish reason of each choice


class Checker:
    """Checks answers against their recipe and against the first answer to it."""

    def __init__(self) -> None:
        self._first: dict[int, Fixed] = {}

    def check(self, recipe: Recipe, answer: Answer) -> None:
        """Check a complete answer. Raises ``WrongAnswer``."""
        if sorted(answer.choices) != list(range(recipe.n)):
            raise WrongAnswer(f"choices {sorted(answer.choices)} where {recipe.n} were asked for")
        choices = [answer.choices[index] for index in range(recipe.n)]
        for choice in choices:
            _check_choice(recipe, choice)
        count = sum(len(choice.token_ids) for choice in choices)
        if answer.completion_tokens not in (None, count):
            raise WrongAnswer(f"usage of {answer.completion_tokens} for {count} tokens")
        found = tuple((tuple(c.token_ids), c.text, c.finish_reasons[0]) for c in choices)
        first = self._first.setdefault(recipe.number, found)
        if found != first:
            raise WrongAnswer(f"recipe {recipe.number} got {found} and before {first}")

    def check_beginning(self, recipe: Recipe, answer: Answer) -> None:
        """Check an answer that the client cut off. Raises ``WrongAnswer``."""
        first = self._first.get(recipe.number)
        for index, choice in answer.choices.items():
            if not 0 <= index < recipe.n:
                raise WrongAnswer(f"choice {index} where {recipe.n} were asked for")
            known: Sequence[int] = first[index][0] if first else choice.token_ids
            if choice.token_ids != list(known[: len(choice.token_ids)]):
                raise WrongAnswer(
                    f"recipe {recipe.number} began with {choice.token_ids} and before with {known}"
                )


def _check_choice(recipe: Recipe, choice: Choice) -> None:
    if len(choice.finish_reasons) != 1:
        raise WrongAnswer(f"a choice ended {len(choice.finish_reasons)} times")
    (reason,), count = choice.finish_reasons, len(choice.token_ids)
    allowed = ("length",) if recipe.runs_to_length else ("length", "stop")
    if reason not in allowed:
        raise WrongAnswer(f"finish reason {reason!r} where {allowed} were possible")
    if count > recipe.max_tokens or (reason == "length" and count != recipe.max_tokens):
        raise WrongAnswer(f"{count} tokens, {reason}, where max_tokens is {recipe.max_tokens}")
