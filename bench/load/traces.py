"""Traces: reads recorded requests from Mooncake JSONL, Azure CSV and JSONL of prompts.

Readers return requests in order of time; requests of one instant stay in the file's order. A line
that cannot be read raises a ``ValueError`` that names the file and the line. It is not skipped,
because a trace with holes is another load. Blank lines are ignored.
"""

from __future__ import annotations

import csv
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

import msgspec
from msgspec import Meta, Struct

from bench.load.prompts import BLOCK

KINDS = ("mooncake", "azure", "prompts")

_WHERE = {
    "mooncake": "Mooncake's traces are in github.com/kvcache-ai/Mooncake, folder "
    "FAST25-release/traces (conversation_trace.jsonl, synthetic_trace.jsonl)",
    "azure": "Azure's traces are in github.com/Azure/AzurePublicDataset: "
    "data/AzureLLMInferenceTrace_code.csv and data/AzureLLMInferenceTrace_conv.csv",
    "prompts": "it is a file of your own: one JSON object a line with its text under 'prompt'",
}
_AZURE_COLUMNS = ("TIMESTAMP", "ContextTokens", "GeneratedTokens")
_TIMESTAMP = re.compile(
    r"(\d{4}-\d\d-\d\d[ T]\d\d:\d\d:\d\d)(?:\.(\d{1,9}))?(Z|[+-]\d\d:\d\d)?", re.ASCII
)
_TEXT_KEYS = ("text", "question")
_OUTPUT_KEYS = ("output_len", "max_tokens", "output_tokens")


@dataclass(frozen=True, slots=True)
class TraceRequest:
    """One request of a trace, or one with lengths drawn from a distribution.

    ``time_s`` counts seconds from the trace's own zero; None if the file has no times. Lengths are
    in tokens. ``input_len`` is None for a prompt of text, ``output_len`` if the file has none.
    Each of ``hash_ids`` stands for ``BLOCK`` tokens of the input, the last for the rest of it.
    """

    time_s: float | None
    input_len: int | None
    output_len: int | None
    hash_ids: tuple[int, ...] = ()
    prompt: str | tuple[int, ...] | None = None


def read_trace(kind: str, path: Path) -> list[TraceRequest]:
    """Read ``path`` as a trace of ``kind``, one of ``KINDS``.

    Raises ``ValueError`` if the kind is unknown, or if the file is malformed or has no requests.
    Raises ``FileNotFoundError`` if there is no such file; its text says where to get the trace.
    """
    readers: dict[str, Callable[[Path], list[TraceRequest]]] = {
        "mooncake": read_mooncake,
        "azure": read_azure,
        "prompts": read_prompts,
    }
    if kind not in readers:
        raise ValueError(f"unknown kind of trace {kind!r}: one of {', '.join(KINDS)}")
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}; {_WHERE[kind]}")
    return readers[kind](path)


class _MooncakeLine(Struct):
    timestamp: Annotated[float, Meta(ge=0)]  # milliseconds
    input_length: Annotated[int, Meta(ge=1)]
    output_length: Annotated[int, Meta(ge=1)]
    hash_ids: tuple[Annotated[int, Meta(ge=0)], ...]


def read_mooncake(path: Path) -> list[TraceRequest]:
    """Read JSONL of ``timestamp`` (ms), ``input_length``, ``output_length`` and ``hash_ids``.

    There is one hash id for each ``BLOCK`` tokens of the input, the last for a part of a block. A
    line with more or fewer is malformed. Other keys are ignored.
    """
    decoder = msgspec.json.Decoder(_MooncakeLine)
    requests = []
    for where, line in _lines(path):
        try:
            found = decoder.decode(line)
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            raise ValueError(f"{where}: {error}") from error
        num_blocks = _num_blocks(found.input_length)
        if len(found.hash_ids) != num_blocks:
            raise ValueError(
                f"{where}: {found.input_length} tokens are {num_blocks} blocks of {BLOCK}, "
                f"but there are {len(found.hash_ids)} hash ids"
            )
        time_s = found.timestamp / 1000
        requests.append(
            TraceRequest(time_s, found.input_length, found.output_length, found.hash_ids)
        )
    return _in_order(path, requests)


def read_azure(path: Path) -> list[TraceRequest]:
    """Read CSV with the columns ``TIMESTAMP``, ``ContextTokens`` and ``GeneratedTokens``.

    The first line is the header. Timestamps are ISO 8601 with up to 9 decimals, and UTC unless they
    end in an offset. Times count from the earliest request.
    """
    times_ns = []
    lengths = []
    for where, (time, context, generated) in _azure_rows(path):
        times_ns.append(_nanoseconds(where, time))
        lengths.append((_count(where, context), _count(where, generated)))
    first_ns = min(times_ns, default=0)
    # Whole nanoseconds until here, because seconds since 1970 as floats lose the last decimals.
    return _in_order(
        path,
        [
            TraceRequest((time_ns - first_ns) / 1e9, *both)
            for time_ns, both in zip(times_ns, lengths, strict=True)
        ],
    )


def _azure_rows(path: Path) -> Iterator[tuple[str, list[str]]]:
    """Yield file and line of each row, and its three columns."""
    # Bytes that are not UTF-8 are replaced; the value is then refused with its line number.
    with path.open(encoding="utf-8-sig", errors="replace", newline="") as file:
        reader = csv.DictReader(file)
        try:
            missing = [name for name in _AZURE_COLUMNS if name not in (reader.fieldnames or ())]
            if missing:
                raise ValueError(f"{path}, line 1: the header lacks {', '.join(missing)}")
            for row in reader:
                columns = [row[name] or "" for name in _AZURE_COLUMNS]
                yield f"{path}, line {reader.line_num}", columns
        except csv.Error as error:
            raise ValueError(f"{path}, after line {reader.line_num}: {error}") from error


def _nanoseconds(where: str, text: str) -> int:
    """Return nanoseconds since 1970. ``datetime`` keeps 6 decimals, Azure has 7."""
    match = _TIMESTAMP.fullmatch(text.strip())
    if match is None:
        raise ValueError(f"{where}: {text!r} is not a timestamp")
    whole, decimals, offset = match.groups()
    try:
        moment = datetime.fromisoformat(whole + (offset or ""))
    except ValueError as error:
        raise ValueError(f"{where}: {text!r} is not a timestamp: {error}") from error
    if moment.tzinfo is None:
        moment = moment.replace(tzinfo=UTC)
    return int(moment.timestamp()) * 10**9 + int((decimals or "0").ljust(9, "0"))


def _count(where: str, text: str) -> int:
    if not re.fullmatch(r"\d{1,9}", text.strip(), re.ASCII) or int(text) < 1:
        raise ValueError(f"{where}: {text!r} is not a number of tokens of at least 1")
    return int(text)


def read_prompts(path: Path) -> list[TraceRequest]:
    """Read JSONL of prompts, one JSON object a line.

    Each object has exactly one of these keys:

    - ``prompt``: a text, or a list of token ids;
    - ``text`` or ``question``: a text;
    - ``messages``: ``{"role", "content"}`` objects; the first of role ``user`` is the prompt;
    - ``conversations``: ShareGPT's ``{"from", "value"}`` objects; the first from ``human`` or
      ``user`` is the prompt, or the first of all if they have no ``from``.

    Optional keys, where null counts as absent: one of ``output_len``, ``max_tokens`` and
    ``output_tokens``; ``timestamp`` in milliseconds, as in Mooncake's traces. Other keys are
    ignored. Requests stay in the file's order unless every one has a time.
    """
    requests = []
    for where, line in _lines(path):
        try:
            found = msgspec.json.decode(line)
            if not isinstance(found, dict):
                raise ValueError("not a JSON object")
            requests.append(_prompt_request(found))
        except (msgspec.DecodeError, ValueError) as error:
            raise ValueError(f"{where}: {error}") from error
    return _in_order(path, requests)


def _prompt_request(found: dict[str, Any]) -> TraceRequest:
    prompt = _prompt(found)
    output_len = _optional(found, _OUTPUT_KEYS)
    if output_len is not None and (type(output_len) is not int or output_len < 1):
        raise ValueError(f"{output_len!r} is not a number of output tokens of at least 1")
    timestamp = _optional(found, ("timestamp",))
    if timestamp is not None and (type(timestamp) not in (int, float) or not 0 <= timestamp < 1e18):
        raise ValueError(f"the timestamp {timestamp!r} is not a time in milliseconds")
    return TraceRequest(
        time_s=None if timestamp is None else timestamp / 1000,
        input_len=None if isinstance(prompt, str) else len(prompt),
        output_len=output_len,
        prompt=prompt,
    )


def _optional(found: dict[str, Any], keys: tuple[str, ...]) -> Any:
    present = [key for key in keys if found.get(key) is not None]
    if len(present) > 1:
        raise ValueError(f"only one of {', '.join(present)} can be given")
    return found[present[0]] if present else None


def _prompt(found: dict[str, Any]) -> str | tuple[int, ...]:
    keys = ("prompt", *_TEXT_KEYS, "messages", "conversations")
    present = [key for key in keys if found.get(key) is not None]
    if len(present) != 1:
        names = ", ".join(present) or "none"
        raise ValueError(f"expected exactly one of {', '.join(keys)}; found {names}")
    (key,) = present
    prompt = found[key]
    if key == "messages":
        prompt = _first_turn(key, prompt, "role", ("user",), "content")
    elif key == "conversations":
        prompt = _first_turn(key, prompt, "from", ("human", "user", None), "value")
    elif key == "prompt" and isinstance(prompt, list):
        if not prompt or not all(type(token) is int and token >= 0 for token in prompt):
            raise ValueError("a prompt in a list must be token ids, at least one")
        return tuple(prompt)
    if not isinstance(prompt, str) or not prompt:
        raise ValueError(f"{key} holds no text")
    return prompt


def _first_turn(
    key: str, turns: Any, speaker_key: str, speakers: tuple[str | None, ...], text_key: str
) -> Any:
    if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
        raise ValueError(f"{key} is not a list of objects")
    for turn in turns:
        if turn.get(speaker_key) in speakers:
            return turn.get(text_key)
    raise ValueError(f"{key} has no turn of the user")


def cut(request: TraceRequest, max_model_len: int) -> TraceRequest:
    """Shorten input and output so that they fit into ``max_model_len`` together.

    The output is shortened first, down to half of ``max_model_len``, then the input with its hash
    ids. An output of unknown length counts as 1. A prompt of text is returned unchanged, because
    only the server knows its length. Raises ``ValueError`` if ``max_model_len`` is below 2.
    """
    if max_model_len < 2:
        raise ValueError(f"no request fits into a model length of {max_model_len}")
    if request.input_len is None:
        return request
    output_len = request.output_len or 1
    if request.input_len + output_len <= max_model_len:
        return request
    output_len = min(output_len, max(max_model_len // 2, max_model_len - request.input_len))
    input_len = min(request.input_len, max_model_len - output_len)
    prompt = request.prompt
    return replace(
        request,
        input_len=input_len,
        output_len=None if request.output_len is None else output_len,
        hash_ids=request.hash_ids[: _num_blocks(input_len)],
        prompt=prompt[:input_len] if isinstance(prompt, tuple) else prompt,
    )


def _num_blocks(num_tokens: int) -> int:
    return -(-num_tokens // BLOCK)


def _lines(path: Path) -> Iterator[tuple[str, bytes]]:
    """Yield file and number of each line that is not blank, and its bytes."""
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                yield f"{path}, line {number}", line


def _in_order(path: Path, requests: list[TraceRequest]) -> list[TraceRequest]:
    if not requests:
        raise ValueError(f"{path} has no requests")
    times = [request.time_s for request in requests if request.time_s is not None]
    if len(times) < len(requests):
        return requests
    return sorted(requests, key=lambda request: request.time_s or 0.0)
