"""The JSON objects of the two text endpoints: whole answers and the chunks of streams."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Protocol

import msgspec

from serve.api.call import Call
from serve.api.encoding import json_list
from serve.dispatch.output import Output

_BYTES_OF_AN_ID = 7


@dataclass(slots=True)
class Collected:
    """The outputs of one choice, joined."""

    token_ids: list[int] = field(default_factory=list)
    end: Output | None = None
    _texts: list[str] = field(default_factory=list)

    @property
    def text(self) -> str:
        return "".join(self._texts)

    def add(self, output: Output) -> None:
        self.token_ids += output.token_ids
        self._texts.append(output.text)
        if output.finish_reason is not None:
            self.end = output


def answer_bytes(call: Call, choices: list[Collected]) -> int:
    """Return about how many bytes of JSON the answer takes."""
    num_ids = 0
    if call.body.return_token_ids:
        num_ids = sum(len(request.prompt_ids) for request in call.requests)
        num_ids += sum(len(choice.token_ids) for choice in choices)
    return sum(len(choice.text) for choice in choices) + _BYTES_OF_AN_ID * num_ids


class Format(Protocol):
    """The objects of one endpoint, as dictionaries ready to be encoded."""

    def response(self, call: Call, choices: list[Collected]) -> dict[str, Any]:
        """Return the answer to a request without ``stream``."""
        ...

    def opening(self, call: Call, index: int) -> dict[str, Any] | None:
        """Return the chunk before a choice's first token; None if the endpoint has none."""
        ...

    def chunk(self, call: Call, index: int, output: Output) -> dict[str, Any]:
        """Return the chunk for one output."""
        ...

    def closing(self, call: Call, num_completion_tokens: int) -> dict[str, Any]:
        """Return the chunk with the usage, which follows the last choice's end."""
        ...


class CompletionFormat:
    """The objects of ``/v1/completions``."""

    def response(self, call: Call, choices: list[Collected]) -> dict[str, Any]:
        """Return a ``text_completion``."""
        return _object(call, "text_completion", choices, lambda c: {"text": c.text})

    def opening(self, call: Call, index: int) -> None:
        """Return None: the first chunk is that of the first token."""

    def chunk(self, call: Call, index: int, output: Output) -> dict[str, Any]:
        """Return a ``text_completion`` with the new text."""
        return _chunk(call, "text_completion", index, {"text": output.text}, output)

    def closing(self, call: Call, num_completion_tokens: int) -> dict[str, Any]:
        """Return a ``text_completion`` without choices."""
        return _closing(call, "text_completion", num_completion_tokens)


class ChatFormat:
    """The objects of ``/v1/chat/completions``."""

    def response(self, call: Call, choices: list[Collected]) -> dict[str, Any]:
        """Return a ``chat.completion``."""

        def message(choice: Collected) -> dict[str, Any]:
            return {"message": {"role": "assistant", "content": choice.text, "refusal": None}}

        return _object(call, "chat.completion", choices, message)

    def opening(self, call: Call, index: int) -> dict[str, Any]:
        """Return the chunk with the role."""
        choice: dict[str, Any] = {
            "index": index,
            "delta": {"role": "assistant", "content": ""},
            "finish_reason": None,
        }
        return _head(call, "chat.completion.chunk") | {"choices": [choice]}

    def chunk(self, call: Call, index: int, output: Output) -> dict[str, Any]:
        """Return a ``chat.completion.chunk`` with the new text."""
        return _chunk(
            call, "chat.completion.chunk", index, {"delta": {"content": output.text}}, output
        )

    def closing(self, call: Call, num_completion_tokens: int) -> dict[str, Any]:
        """Return a ``chat.completion.chunk`` without choices."""
        return _closing(call, "chat.completion.chunk", num_completion_tokens)


def _head(call: Call, kind: str) -> dict[str, Any]:
    head = call.head
    return {"id": head.id, "object": kind, "created": head.created, "model": head.model}


def _closing(call: Call, kind: str, num_completion_tokens: int) -> dict[str, Any]:
    return _head(call, kind) | {"choices": [], "usage": call.usage(num_completion_tokens)}


def _object(call: Call, kind: str, choices: list[Collected], body: Any) -> dict[str, Any]:
    entries = []
    for index, collected in enumerate(choices):
        end = collected.end
        entry = {"index": index} | body(collected)
        entry |= {
            "logprobs": None,
            "finish_reason": end.finish_reason if end else None,
            "stop_reason": end.stop_reason if end else None,
        }
        if call.body.return_token_ids:
            entry["prompt_token_ids"] = json_list(call.prompt_of(index))
            entry["token_ids"] = json_list(collected.token_ids)
        if end is not None:
            entry |= _timeline(call, end)
        entries.append(entry)
    num_tokens = sum(len(collected.token_ids) for collected in choices)
    return _head(call, kind) | {
        "choices": entries,
        "usage": call.usage(num_tokens),
        "system_fingerprint": None,
    }


def _chunk(
    call: Call, kind: str, index: int, body: dict[str, Any], output: Output
) -> dict[str, Any]:
    entry = {"index": index} | body
    entry |= {"logprobs": None, "finish_reason": output.finish_reason}
    if output.finish_reason is not None:
        entry["stop_reason"] = output.stop_reason
        entry |= _timeline(call, output)
    if call.body.return_token_ids:
        if output.first_index == 0:
            entry["prompt_token_ids"] = json_list(call.prompt_of(index))
        entry["token_ids"] = output.token_ids
    return _head(call, kind) | {"choices": [entry]}


def _timeline(call: Call, end: Output) -> dict[str, Any]:
    if not call.body.return_timeline or end.timeline is None:
        return {}
    return {"timeline": msgspec.to_builtins(end.timeline)}
