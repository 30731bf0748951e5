"""Client: sends streaming requests to an OpenAI-compatible server and times their tokens."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import aiohttp
import msgspec
from msgspec import Struct

from bench.load.record import Record

MAX_ERROR_CHARS = 300
_READ_BYTES = 1 << 18
_SILENCE_S = 600.0  # a request without a byte for so long fails, so a stalled server ends the run


@dataclass(frozen=True, slots=True)
class Target:
    """The server under load. Several base URLs are copies of it, used in turn."""

    base_urls: tuple[str, ...]
    model: str
    api_key: str | None = None
    chat: bool = False
    ignore_eos: bool = True
    token_ids: bool = False  # count tokens by their ids instead of by the running usage
    extra_body: dict[str, Any] = field(default_factory=dict)

    def body(self, prompt: str | list[int], max_tokens: int) -> bytes:
        """Return a request as JSON. A None in ``extra_body`` removes the field of that name."""
        content: dict[str, Any] = (
            {"messages": [{"role": "user", "content": prompt}]} if self.chat else {"prompt": prompt}
        )
        fields = content | {
            "model": self.model,
            "max_tokens": max_tokens,
            "temperature": 0.0,
            "stream": True,
            "stream_options": {"include_usage": True, "continuous_usage_stats": True},
            "ignore_eos": self.ignore_eos,
            "return_timeline": True,
        }
        if self.token_ids:
            fields["return_token_ids"] = True
            fields["stream_options"] = {"include_usage": True}
        fields |= self.extra_body
        return msgspec.json.encode({k: v for k, v in fields.items() if v is not None})

    @property
    def headers(self) -> dict[str, str]:
        key = {"Authorization": f"Bearer {self.api_key}"} if self.api_key else {}
        return {"Content-Type": "application/json", **key}

    @property
    def path(self) -> str:
        return "/v1/chat/completions" if self.chat else "/v1/completions"


class _Usage(Struct):
    prompt_tokens: int = 0
    completion_tokens: int | None = None


class _Choice(Struct):
    text: str | None = None
    delta: dict[str, Any] | None = None
    token_ids: list[int] | None = None
    timeline: dict[str, float | None] | None = None

    @property
    def has_text(self) -> bool:
        delta = self.delta or {}
        return bool(self.text or delta.get("content") or delta.get("reasoning_content"))


class _Chunk(Struct):
    choices: list[_Choice] = []
    usage: _Usage | None = None
    error: Any = None


_decode_chunk = msgspec.json.Decoder(_Chunk).decode


class RequestFailed(Exception):
    """The server refused a request or broke off its answer; the text says why."""


class Client:
    """The connections to one target. Use as ``async with``."""

    def __init__(self, target: Target) -> None:
        self._target = target
        self._session: aiohttp.ClientSession | None = None

    async def __aenter__(self) -> Client:
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=60, sock_read=_SILENCE_S)
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=60),
            headers=self._target.headers,
            timeout=timeout,
            read_bufsize=_READ_BYTES,
            auto_decompress=False,
        )
        return self

    async def __aexit__(self, *_: object) -> None:
        assert self._session is not None
        await self._session.close()

    async def send(self, record: Record, body: bytes) -> Record:
        """Send ``body`` and fill ``record`` until the answer ends. A failure sets its error."""
        urls = self._target.base_urls
        url = urls[record.index % len(urls)] + self._target.path
        record.sent_s = time.monotonic()
        try:
            await self._receive(record, url, body)
        except (aiohttp.ClientError, TimeoutError, RequestFailed, msgspec.MsgspecError) as error:
            text = str(error) or type(error).__name__
            record.error = text[:MAX_ERROR_CHARS]
        record.end_s = time.monotonic()
        return record

    async def _receive(self, record: Record, url: str, body: bytes) -> None:
        assert self._session is not None
        async with self._session.post(url, data=body) as response:
            if response.status != 200:
                raise RequestFailed(f"{response.status}: {_message(await response.read())}")
            answer = _Answer(record)
            async for data in response.content.iter_any():
                answer.feed(data, time.monotonic())
            answer.close()


class _Answer:
    """Parses the server-sent events of one answer as its bytes come."""

    def __init__(self, record: Record) -> None:
        self._record = record
        self._rest = b""
        self._done = False
        self._num_reported: int | None = None  # the newest completion_tokens of a usage
        self._num_counted = 0  # the tokens whose times are known

    def feed(self, data: bytes, now_s: float) -> None:
        """Parse bytes that were read at ``now_s``. An event may be split over two calls."""
        before = self._num_counted
        for payload in self._payloads(data):
            self._done = self._done or payload.startswith(b"[DONE]")
            if not self._done:
                self._chunk(_decode_chunk(payload))
        if self._num_counted > before:
            self._record.token_times_s.append(now_s)
            self._record.token_counts.append(self._num_counted - before)

    def close(self) -> None:
        """Check at the end of the stream that it was complete, and set the number of tokens."""
        if not self._done:
            raise RequestFailed("the stream broke off before [DONE]")
        record = self._record
        record.num_output_tokens = (
            self._num_counted if self._num_reported is None else self._num_reported
        )
        record.counted = record.counted and self._num_counted == record.num_output_tokens
        if record.num_output_tokens == 0 or not record.token_times_s:
            raise RequestFailed("the answer has no tokens")

    def _payloads(self, data: bytes) -> Iterator[bytes]:
        *lines, self._rest = (self._rest + data).split(b"\n")
        for line in lines:
            if line.startswith(b"data:"):
                yield line[5:].strip()

    def _chunk(self, chunk: _Chunk) -> None:
        if chunk.error:
            raise RequestFailed(str(chunk.error))
        record = self._record
        for choice in chunk.choices:
            if choice.timeline is not None:
                record.timeline = choice.timeline
        usage = chunk.usage
        if usage is not None and usage.completion_tokens is not None:
            self._num_reported = usage.completion_tokens
            record.num_prompt_tokens = usage.prompt_tokens or record.num_prompt_tokens
            if chunk.choices:  # a running count; a usage without choices comes once, at the end
                self._num_counted = max(self._num_counted, usage.completion_tokens)
            return
        for choice in chunk.choices:
            if choice.token_ids is not None:
                self._num_counted += len(choice.token_ids)
            elif choice.has_text:
                # The number of tokens comes at the end, so a chunk counts as one until then.
                self._num_counted += 1
                record.counted = False


def _message(body: bytes) -> str:
    """Return the message of an error answer, in any of the common forms."""
    try:
        found = msgspec.json.decode(body)
    except msgspec.MsgspecError:
        return body.decode(errors="replace")
    error = found.get("error", found) if isinstance(found, dict) else found
    return str(error.get("message", error) if isinstance(error, dict) else error)


async def find_model(base_url: str, headers: dict[str, str]) -> str:
    """Return the first model of ``/v1/models``. Raises ``RequestFailed`` if there is none."""
    try:
        timeout = aiohttp.ClientTimeout(total=30)
        async with (
            aiohttp.ClientSession(headers=headers, timeout=timeout) as session,
            session.get(f"{base_url}/v1/models") as response,
        ):
            body = await response.read()
            if response.status != 200:
                raise RequestFailed(f"{base_url}/v1/models: {response.status}: {_message(body)}")
            return str(msgspec.json.decode(body)["data"][0]["id"])
    except (aiohttp.ClientError, TimeoutError) as error:
        raise RequestFailed(f"{base_url} does not answer: {error}") from error
    except (msgspec.MsgspecError, LookupError, TypeError) as error:
        raise RequestFailed(f"{base_url}/v1/models names no model: {error!r}") from error
