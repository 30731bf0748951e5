"""How long the GPU waits between decode steps, as served: one replica, all sequences running.

    python -m bench.micro.decode_gaps MODEL [--sequences 64] [--context 1024] [--steps 200]

MODEL is a directory with a config.json; the weights are random. Prints one JSON object: the time of
a step, by the arrival of its tokens on the event loop, without a profiler; then, from a trace of as
many steps right after, the share of the time in which the device ran nothing, and the stretches of
it. Tracing slows the steps, and with them the share, as far as ``profiled_step_ms`` is longer.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import uvloop
from torch._C._autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from serve.config.server import ServerConfig, parse_args
from serve.dispatch.service import Service, Stream
from serve.protocol.messages import AnyMessage, Report
from serve.request import FinishReason, Request, SamplingParams
from serve.runtime.rank import RankProcess, join_job
from serve.runtime.shutdown import exit_now
from serve.runtime.startup import serving_front_end
from serve.topology import read_rank_info

BUDGET = 8192  # tokens of a step while the prompts are read
WARM_UPS = 20  # steps before the first window
EDGE = 8  # traced steps before the window: starting the tracer holds up the GPU thread
SLACK = 200  # steps that may pass between the windows
MIN_GAP_NS = 1000


def main(argv: Sequence[str] | None = None) -> None:
    """Measure both windows; print what was found."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--sequences", type=int, default=64)
    parser.add_argument("--context", type=int, default=1024, help="tokens of each prompt")
    parser.add_argument("--steps", type=int, default=200, help="of each window")
    args = parser.parse_args(argv)
    if min(args.sequences, args.context, args.steps) < 1:
        parser.error("counts must be at least 1")
    load = Load(args.sequences, args.context, args.steps)
    config = parse_args(load.options(args.model), 1)
    print(json.dumps(uvloop.run(_measure(config, load))), flush=True)
    exit_now(0)


@dataclass(frozen=True, slots=True)
class Load:
    """Sequences that all run throughout both windows."""

    sequences: int
    context: int
    steps: int

    @property
    def budget(self) -> int:
        """Tokens of a step; half of them are left to prompts when all sequences decode."""
        return max(BUDGET, 2 * self.sequences)

    @property
    def max_tokens(self) -> int:
        """Enough for the first sequence to run until the last one has been measured."""
        num_prefills = -(-2 * self.sequences * self.context // self.budget) + 1
        return num_prefills + WARM_UPS + 2 * self.steps + 2 * EDGE + SLACK

    def options(self, model: Path) -> list[str]:
        """Of a server that can take it."""
        return [
            "--model", str(model), "--load-format", "dummy", "--tokenizer", "none",
            "--max-num-seqs", str(self.sequences), "--max-num-batched-tokens", str(self.budget),
            "--max-model-len", str(self.context + self.max_tokens),
        ]  # fmt: skip

    def requests(self, vocab_size: int) -> list[Request]:
        """Random prompts; half are answered greedily, half are sampled."""
        rng = random.Random(0)
        return [
            Request(
                id=f"r{i}",
                prompt_ids=tuple(rng.choices(range(vocab_size), k=self.context)),
                sampling=SamplingParams(
                    max_tokens=self.max_tokens, temperature=float(i % 2), seed=i, ignore_eos=True
                ),
            )
            for i in range(self.sequences)
        ]


@dataclass(slots=True)
class FullSteps:
    """When the tokens of each step that all sequences were in have come to the loop."""

    num_sequences: int
    times_s: list[float] = field(default_factory=list)
    _wanted: int = 0
    _reached: asyncio.Event = field(default_factory=asyncio.Event)

    def on_message(self, message: AnyMessage) -> None:
        """Note a report that has a token for everyone."""
        if isinstance(message, Report) and len(message.deltas) == self.num_sequences:
            self.times_s.append(time.perf_counter())
            if len(self.times_s) >= self._wanted:
                self._reached.set()

    async def pass_by(self, count: int) -> int:
        """Wait for ``count`` more steps: the number of the last one."""
        self._wanted = len(self.times_s) + count
        self._reached.clear()
        await self._reached.wait()
        return len(self.times_s) - 1


async def _measure(config: ServerConfig, load: Load) -> dict[str, Any]:
    found: dict[str, Any] = {}
    process = join_job(config, read_rank_info({}))
    await _serve(process, load, found)
    return found


async def _serve(process: RankProcess, load: Load, found: dict[str, Any]) -> None:
    steps = FullSteps(load.sequences)
    async with serving_front_end(process, observe=steps.on_message) as front_end:
        await front_end.get_ready()
        # One more for each: a newcomer leaves every running sequence a block to grow.
        blocks_each = -(-(load.context + load.max_tokens) // process.setup.block_size) + 1
        needed = load.sequences * blocks_each
        if needed > (num_blocks := front_end.num_blocks[0]):
            raise ValueError(f"{needed} blocks are needed, the KV cache has {num_blocks}")
        requests = load.requests(process.config.model_config.vocab_size)
        async with asyncio.TaskGroup() as group:
            for stream in front_end.service.submit(requests):
                group.create_task(_read(stream))
            found |= await _watch(process, steps, load)
            _abort(front_end.service, requests)


def _abort(service: Service, requests: Sequence[Request]) -> None:
    for request in requests:
        service.abort(request.id)


async def _read(stream: Stream) -> None:
    """Take the tokens as a client's handler does."""
    async for output in stream:
        if output.finish_reason not in (None, FinishReason.ABORT):
            raise RuntimeError(f"{stream.request.id} ended ({output.finish_reason}) too early")


async def _watch(process: RankProcess, steps: FullSteps, load: Load) -> dict[str, Any]:
    first = await steps.pass_by(WARM_UPS)
    last = await steps.pass_by(load.steps)
    elapsed_s = steps.times_s[last] - steps.times_s[first]
    found: dict[str, Any] = {
        "sequences": load.sequences,
        "context": load.context,
        "steps": last - first,
        "step_ms": elapsed_s / (last - first) * 1e3,
    }
    if process.setup.device.type != "cuda":
        return found | dict.fromkeys(Idle._fields)
    spans = await _trace(process, steps, load.steps)
    return found | measure_idle(spans, load.steps)._asdict()


# --- the trace ----------------------------------------------------------------------------------


class Span(NamedTuple):
    """One kernel, copy or fill on the device."""

    name: str
    start_ns: int
    end_ns: int


async def _trace(process: RankProcess, steps: FullSteps, num_steps: int) -> list[Span]:
    """All that the device does in at least ``num_steps`` steps, and ``EDGE`` on both sides."""
    call = process.worker.executor.call
    tracer = profile(activities=[ProfilerActivity.CUDA])
    await call(tracer.start)  # in the GPU thread: a trace must end in the thread that began it
    await steps.pass_by(num_steps + 2 * EDGE)
    await call(tracer.stop)
    return read_spans(tracer)


def read_spans(tracer: profile) -> list[Span]:
    """What ran on the device, in order of its start."""
    results = tracer.profiler.kineto_results if tracer.profiler is not None else None
    if results is None:
        raise RuntimeError("the trace was not taken")
    spans = [
        Span(event.name(), event.start_ns(), event.start_ns() + event.duration_ns())
        for event in results.events()
        if event.device_type() == DeviceType.CUDA and _occupies(event.name())
    ]
    return sorted(spans, key=lambda span: span.start_ns)


def _occupies(name: str) -> bool:
    """Whether this is work: a trace may also have the device's waits for events."""
    return not name.endswith((" Sync", " Wait Event"))


class Idle(NamedTuple):
    """What the device did not do between two steps of a trace."""

    profiled_step_ms: float
    busy_ms: float  # of a step
    idle_share: float
    between_steps_share: float  # of that: from a step's last kernel to the next one's first
    gap_p50_us: float
    gap_p99_us: float
    gap_max_us: float
    gaps_per_step: float


def measure_idle(spans: Sequence[Span], num_steps: int) -> Idle:
    """How idle the device was over ``num_steps`` steps of ``spans`` (in order of their starts).

    Each step ends with the copy of its tokens to the host, and the window with the last of them.
    The first ``EDGE`` steps are left out. Only gaps over 1 us count as such; all idle time counts
    in the shares. ``ValueError`` if the trace has too few steps.
    """
    ends_ns = sorted(span.end_ns for span in spans if "DtoH" in span.name)
    if len(ends_ns) <= EDGE + num_steps:
        raise ValueError(f"the trace has {len(ends_ns)} steps of {EDGE + num_steps + 1} wanted")
    bounds_ns = np.array(ends_ns[EDGE : EDGE + num_steps + 1])
    first_ns, last_ns = bounds_ns[0], bounds_ns[-1]
    times = np.array([(span.start_ns, span.end_ns) for span in spans])
    gaps = _gaps(times, first_ns, last_ns)
    lengths = gaps[:, 1] - gaps[:, 0]
    wall_ns, idle_ns = last_ns - first_ns, lengths.sum()
    kernels = np.array([times[i] for i, s in enumerate(spans) if not s.name.startswith("Mem")])
    between_ns = sum(_idle_around(gaps, kernels, bound_ns) for bound_ns in bounds_ns[:-1])
    long_us = lengths[lengths > MIN_GAP_NS] / 1e3
    p50_us, p99_us, max_us = np.percentile(long_us, (50, 99, 100)) if len(long_us) else (0, 0, 0)
    return Idle(
        profiled_step_ms=float(wall_ns / num_steps / 1e6),
        busy_ms=float((wall_ns - idle_ns) / num_steps / 1e6),
        idle_share=float(idle_ns / wall_ns),
        between_steps_share=float(between_ns / wall_ns),
        gap_p50_us=float(p50_us),
        gap_p99_us=float(p99_us),
        gap_max_us=float(max_us),
        gaps_per_step=len(long_us) / num_steps,
    )


def _gaps(times: np.ndarray, first_ns: int, last_ns: int) -> np.ndarray:
    """``[num_gaps, 2]``: stretches of the window in which none of ``times`` runs."""
    starts = np.append(times[:, 0], last_ns)
    so_far = np.maximum.accumulate(np.append(first_ns, times[:, 1]))  # the end of all before
    gaps = np.stack((so_far, np.minimum(starts, last_ns)), axis=1)
    return gaps[gaps[:, 0] < gaps[:, 1]]


def _idle_around(gaps: np.ndarray, kernels: np.ndarray, bound_ns: int) -> int:
    """Idle time between the last kernel that begins before ``bound_ns`` and the first after it."""
    after = int(np.searchsorted(kernels[:, 0], bound_ns))
    if after in (0, len(kernels)):
        return 0
    low_ns, high_ns = kernels[:after, 1].max(), kernels[after, 0]
    inside = np.clip(gaps, low_ns, max(low_ns, high_ns))
    return int((inside[:, 1] - inside[:, 0]).sum())


if __name__ == "__main__":
    main()
