"""FakeCluster: the real service, dispatcher and HTTP over replicas that only exchange messages.

Output token i has the id ``FIRST_ID + i`` and the text ``" ti"``. Token 0 comes from the prefill
replica and the others from the decode replica, one per turn of the event loop, until ``max_tokens``
or the token at which the test holds them.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass

from aiohttp import web

from serve.api.app import create_app, run_app_on
from serve.api.settings import ApiSettings
from serve.config.http import HttpLimits
from serve.config.model_source import default_model
from serve.dispatch.admission import QueueLimits
from serve.dispatch.dispatcher import Dispatcher
from serve.dispatch.metrics import Metrics
from serve.dispatch.service import Service
from serve.protocol.messages import Abort, AnyMessage, Delta, Prefill, ReplicaLoad, Report
from serve.request import FinishReason, Request, Timeline
from serve.tokenizer.tokenizer import Tokenizer, load_tokenizer
from serve.topology import ReplicaSpec, build_topology

MODEL = "org/model"
ALIAS = "alias"
FIRST_ID = 1000
VOCAB_SIZE = 49152  # SmolLM2's
NUM_BLOCKS = 100
MAX_MODEL_LEN = 512


def load_test_tokenizer() -> Tokenizer:
    """Load SmolLM2's tokenizer, which is byte-level and has a chat template."""
    path = default_model().path
    return load_tokenizer(path, path, None)


def texts(count: int, start: int = 0) -> str:
    """Return the text of tokens ``[start, start + count)`` of any request."""
    return "".join(f" t{i}" for i in range(start, start + count))


@dataclass
class Progress:
    """A request that the fake replicas hold."""

    request: Request
    decode_replica: int
    num_tokens: int = 0
    end_at: int | None = None  # with finish_reason stop, as after a stop string
    running: bool = False


class FakeCluster:
    """Simulated replicas on the running event loop, and the real server in front of them."""

    def __init__(
        self,
        tokenizer: Tokenizer | None,
        *,
        num_prefill: int = 1,
        num_decode: int = 1,
        max_waiting: int = 4096,
        max_waiting_tokens: int = 1 << 23,
        max_waiting_share: float = 1.0,
        ready: bool = True,
        api_key: str | None = None,
        max_body_bytes: int = 1 << 20,
        limits: HttpLimits | None = None,
    ) -> None:
        specs = [ReplicaSpec(1)] * (num_prefill + num_decode)
        self.topology = build_topology(specs, num_prefill, mixed=False)
        self.metrics = Metrics(MODEL)
        queue = QueueLimits(max_waiting, max_waiting_tokens, max_waiting_share)
        self.dispatcher = Dispatcher(self.topology.replicas, "round-robin", queue, time.monotonic)
        self.service = Service(self.dispatcher, self.send, self.metrics, time.monotonic)
        settings = ApiSettings(
            served_model_names=(MODEL, ALIAS),
            model_path="/models/m",
            vocab_size=VOCAB_SIZE,
            created=7,
            api_keys=(api_key,) if api_key else (),
            http=limits or HttpLimits(max_body_bytes=max_body_bytes),
        )
        self.app = create_app(self.service, tokenizer, self.metrics, settings)
        self.hold_at: int | None = None  # tokens after which requests wait for ``release``
        self.stop_at: int | None = None  # tokens after which they end with "stop"
        self.active: dict[str, Progress] = {}
        self.aborted: list[str] = []
        self.seen: list[Request] = []
        self._changed = asyncio.Event()
        if ready:
            self.service.set_ready(
                MAX_MODEL_LEN, 16, {replica.id: NUM_BLOCKS for replica in self.topology.replicas}
            )

    def send(self, rank: int, message: AnyMessage) -> None:
        """Take a message that rank 0 would send on the control channel."""
        match message:
            case Prefill():
                for request, decode_replica in message.requests:
                    self.seen.append(request)
                    progress = Progress(request, decode_replica, end_at=self.stop_at)
                    self.active[request.id] = progress
                    self._start(progress, rank)
            case Abort(request_id):
                if self.active.pop(request_id, None) is not None:
                    self.aborted.append(request_id)
            case _:
                raise AssertionError(f"rank 0 sent {message} to rank {rank}")
        self._changed.set()

    def release(self) -> None:
        """Let all held requests run to completion."""
        self.hold_at = None
        for progress in self.active.values():
            self._start(progress, progress.decode_replica)

    def report(self, replica_id: int, *deltas: Delta) -> None:
        """Send rank 0 a report of a replica."""
        load = ReplicaLoad(num_blocks=NUM_BLOCKS, num_free_blocks=60, num_running=len(self.active))
        self.service.on_report(Report(replica_id, load, deltas, num_step_tokens=len(deltas)))
        self._changed.set()

    async def until(self, condition: Callable[[], bool]) -> None:
        """Wait until ``condition`` holds; it is checked after every message."""
        while not condition():
            self._changed.clear()
            await self._changed.wait()

    def assert_at_rest(self) -> None:
        """Check that no state is left of any request."""
        assert self.service.num_active == 0
        assert self.dispatcher.num_waiting == 0
        assert not self.active
        for state in self.dispatcher.states:
            assert (state.num_prefill_tokens, state.num_decode_tokens) == (0, 0)
            assert state.num_requests == 0

    def _start(self, progress: Progress, replica_id: int) -> None:
        if not progress.running:
            progress.running = True
            asyncio.get_running_loop().call_soon(self._turn, progress, replica_id)

    def _turn(self, progress: Progress, replica_id: int) -> None:
        """Produce one token of a request, unless the request has ended or is held."""
        progress.running = False
        request, index = progress.request, progress.num_tokens
        if self.active.get(request.id) is not progress or index == self.hold_at:
            return
        progress.num_tokens += 1
        reason = _reason(progress)
        if reason is not None:
            del self.active[request.id]
        self.report(replica_id, make_delta(request.id, index, reason))
        if reason is None:
            self._start(progress, progress.decode_replica)


def _reason(progress: Progress) -> FinishReason | None:
    if progress.num_tokens == progress.end_at:
        return FinishReason.STOP
    at_limit = progress.num_tokens >= progress.request.sampling.max_tokens
    return FinishReason.LENGTH if at_limit else None


def make_delta(request_id: str, index: int, reason: FinishReason | None = None) -> Delta:
    """Return a delta with token ``index`` of a request."""
    stamps = None
    if index == 0:
        stamps = Timeline(prefill_queued_s=1.0, prefill_started_s=2.0, prefill_ended_s=4.0)
    return Delta(
        request_id=request_id,
        first_index=index,
        token_ids=(FIRST_ID + index,),
        text=f" t{index}",
        finish_reason=reason,
        timeline=stamps,
    )


@contextlib.asynccontextmanager
async def serving(app: web.Application) -> AsyncIterator[str]:
    """Serve ``app`` on a free port and yield ``http://host:port``."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        runner = await run_app_on(app, listener)
        try:
            host, port = listener.getsockname()
            yield f"http://{host}:{port}"
        finally:
            await runner.cleanup()
