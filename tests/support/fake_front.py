"""A fake service and tokenizer for the HTTP front end, with tokens computed from the request."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator, Sequence
from typing import Any, cast

from serve.api.app import create_app, run_app_on
from serve.api.settings import ApiSettings
from serve.dispatch.metrics import Metrics
from serve.dispatch.service import Output, Overloaded, Service, Stream, Unavailable
from serve.request import FinishReason, Request, Timeline
from serve.tokenizer.detokenizer import Detokenizer
from serve.tokenizer.tokenizer import UNKNOWN, Tokenizer

VOCAB_SIZE = 300
NUM_BYTES = 256  # ids from here on have no token


class FakeTokenizer:
    """A tokenizer with one id for each byte of UTF-8."""

    vocab_size = VOCAB_SIZE
    has_chat_template = True
    strips_leading_space = False

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        return list(text.encode())

    def least_tokens(self, text: str, enough: int) -> int:
        return len(text.encode())

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        return b"".join(self.pieces(True)[i] if i < VOCAB_SIZE else UNKNOWN for i in ids).decode(
            "utf-8", "replace"
        )

    def id_to_token(self, token_id: int) -> str:
        return self.decode([token_id])

    def pieces(self, skip_special_tokens: bool) -> tuple[bytes, ...]:
        return tuple(bytes([i]) if i < NUM_BYTES else UNKNOWN for i in range(VOCAB_SIZE))

    def render_chat(
        self, messages: list[dict[str, Any]], add_generation_prompt: bool = True, **kwargs: Any
    ) -> str:
        if kwargs.get("refuse"):
            raise ValueError(str(kwargs["refuse"]))
        lines = [f"{message['role']}:{message['content']}" for message in messages]
        return "\n".join([*lines, "assistant:"] if add_generation_prompt else lines)


def token(request: Request, index: int) -> int:
    """Return token ``index`` of ``request``: a letter that depends on prompt, seed and index."""
    seed = request.sampling.seed if request.sampling.temperature else 0
    return ord("a") + (sum(request.prompt_ids) + seed + index) % 26


def text(request: Request, count: int) -> str:
    """Return the text of the first ``count`` tokens."""
    return "".join(chr(token(request, index)) for index in range(count))


class FakeService:
    """A service that emits one token per turn of the event loop, or as a test says."""

    def __init__(self, max_model_len: int = 2048, auto: bool = True) -> None:
        self.ready, self.draining = True, False
        self.max_model_len = max_model_len
        self.max_active = self.max_waiting = 1000
        self.max_waiting_tokens = 1 << 23
        self.clients: list[str] = []  # of each call
        self.auto = auto
        self.active: dict[str, Stream] = {}
        self.requests: list[Request] = []  # all that were submitted
        self.submitted: asyncio.Queue[Request] = asyncio.Queue()
        self.aborted: asyncio.Queue[str] = asyncio.Queue()  # only those that were active
        self._texts: dict[str, Detokenizer] = {}

    def submit(self, requests: Sequence[Request], client: str = "") -> list[Stream]:
        self.check_open()
        self.clients.append(client)
        if len(self.active) + len(requests) > self.max_active:
            raise Overloaded("too many wait", 2.5)
        streams = [self._open(request) for request in requests]
        for request in requests:
            self.submitted.put_nowait(request)
            if self.auto:
                asyncio.get_running_loop().call_soon(self._run, request, 0)
        return streams

    def check_open(self) -> None:
        if self.draining or not self.ready:
            raise Unavailable("the server is starting or shutting down")

    def abort(self, request_id: str) -> None:
        if request_id in self.active:
            self.aborted.put_nowait(request_id)
            self.end(request_id, FinishReason.ABORT)

    def cluster(self) -> list[dict[str, Any]]:
        return [{"id": 0, "role": "mixed"}]

    def emit(self, request: Request, index: int) -> None:
        """Emit token ``index`` of ``request``, with a finish reason if it is the last."""
        sampling = request.sampling
        token_id = token(request, index)
        piece = self._texts[request.id].push(token_id)
        if piece.stop is not None:
            self.end(request.id, FinishReason.STOP, index, (token_id,), piece.text, piece.stop)
        elif token_id in sampling.stop_token_ids:
            self.end(request.id, FinishReason.STOP, index, (token_id,), piece.text, token_id)
        elif index + 1 == sampling.max_tokens:
            tail = piece.text + self._texts[request.id].finish()
            self.end(request.id, FinishReason.LENGTH, index, (token_id,), tail)
        else:
            self._put(request.id, index, (token_id,), piece.text)

    def end(
        self,
        request_id: str,
        reason: FinishReason,
        first_index: int = 0,
        token_ids: tuple[int, ...] = (),
        text: str = "",
        stop_reason: str | int | None = None,
        error: str | None = None,
    ) -> None:
        """Emit the last output of a request."""
        self._put(
            request_id, first_index, token_ids, text, finish_reason=reason, error=error,
            stop_reason=stop_reason, timeline=Timeline(arrived_s=1.0, finished_s=2.5),
        )  # fmt: skip
        del self.active[request_id]

    def _open(self, request: Request) -> Stream:
        stream = Stream(request)
        self.active[request.id] = stream
        self.requests.append(request)
        self._texts[request.id] = Detokenizer(
            cast(Tokenizer, FakeTokenizer()), request.sampling, request.prompt_ids
        )
        return stream

    def _run(self, request: Request, index: int) -> None:
        if request.id in self.active:
            self.emit(request, index)
            asyncio.get_running_loop().call_soon(self._run, request, index + 1)

    def _put(
        self, request_id: str, index: int, ids: tuple[int, ...], text: str, **end: Any
    ) -> None:
        self.active[request_id].put(
            Output(request_id=request_id, first_index=index, token_ids=ids, text=text, **end)
        )


@contextlib.asynccontextmanager
async def serving(
    service: FakeService, tokenizer: FakeTokenizer | None = None, **settings: Any
) -> AsyncIterator[str]:
    """Serve the front end of ``service`` as the launcher does; yield its URL."""
    defaults: dict[str, Any] = {
        "served_model_names": ("org/model", "alias"), "model_path": "/models/m",
        "vocab_size": VOCAB_SIZE, "created": 1,
    }  # fmt: skip
    app = create_app(
        cast(Service, service),
        cast("Tokenizer | None", tokenizer),
        Metrics("org/model"),
        ApiSettings(**(defaults | settings)),
    )
    listener = socket.create_server(("127.0.0.1", 0))
    port = listener.getsockname()[1]
    runner = await run_app_on(app, listener)
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        await runner.cleanup()
