"""Measure how long the GPU is idle between decode steps in serving, with all sequences running.

    python -m bench.micro.decode_gaps MODEL [--sequences 64] [--context 1024] [--steps 200]

MODEL is a directory with a config.json; the weights are random. One replica serves all sequences.
Prints one JSON object with two measurements. First, without a profiler: the time of a step, from
the arrival of its tokens on the event loop. Then, from a trace of as many further steps: the share
of time in which the device was idle, and the lengths of the gaps. Tracing slows the steps and so
changes the share; compare ``profiled_step_ms`` with ``step_ms``.
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
from serve.model_config.kv_layout import num_blocks_for
from serve.protocol.messages import AnyMessage, Report
from serve.request import FinishReason, Request, SamplingParams, pack_ids
from serve.runtime.join import join_job
from serve.runtime.rank import RankProcess
from serve.runtime.shutdown import exit_now
from serve.runtime.startup import serving_front_end
from serve.topology import read_rank_info

BUDGET = 8192  # tokens of a step while the prompts are prefilled
WARM_UPS = 20  # steps before the first window
EDGE = 8  # traced steps before the window, because starting the tracer delays the GPU thread
SLACK = 200  # steps that may run between the windows
MIN_GAP_NS = 1000


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path, help="directory with a config.json")
    parser.add_argument("--sequences", type=int, default=64)
    parser.add_argument("--context", type=int, default=1024, help="tokens of each prompt")
    parser.add_argument("--steps", type=int, default=200, help="steps of each window")
    args = parser.parse_args(argv)
    if min(args.sequences, args.context, args.steps) < 1:
        parser.error("counts must be at least 1")
    load = Load(args.sequences, args.context, args.steps)
    config = parse_args(load.options(args.model), 1)
    print(json.dumps(uvloop.run(_measure(config, load))), flush=True)
    exit_now(0)


@dataclass(frozen=True, slots=True)
class Load:
    """Sequences that all keep running throughout both windows."""

    sequences: int
    context: int
    steps: int

    @property
    def budget(self) -> int:
        """Tokens of a step. Half of them are left for prompts when all sequences decode."""
        return max(BUDGET, 2 * self.sequences)

    @property
    def max_tokens(self) -> int:
        """Output tokens of a sequence, enough for the first to outlast the second window."""
        num_prefills = -(-2 * self.sequences * self.context // self.budget) + 1
        return num_prefills + WARM_UPS + 2 * self.steps + 2 * EDGE + SLACK

    def options(self, model: Path) -> list[str]:
        """Return the options of a server that can hold this load."""
        return [
            "--model", str(model), "--load-format", "dummy", "--tokenizer", "none",
            "--max-num-seqs", str(self.sequences), "--max-num-batched-tokens", str(self.budget),
            "--max-model-len", str(self.context + self.max_tokens),
        ]  # fmt: skip

    def requests(self, vocab_size: int) -> list[Request]:
        """Make requests with random prompts. Half are greedy, half are sampled."""
        rng = random.Random(0)
        return [
            Request(
                id=f"r{i}",
                prompt=pack_ids(rng.choices(range(vocab_size), k=self.context)),
                sampling=SamplingParams(
                    max_tokens=self.max_tokens, temperature=float(i % 2), seed=i, ignore_eos=True
                ),
            )
            for i in range(self.sequences)
        ]


@dataclass(slots=True)
class FullSteps:
    """The arrival times, on the event loop, of the tokens of steps that had all sequences."""

    num_sequences: int
    times_s: list[float] = field(default_factory=list)
    _target: int = 0
    _reached: asyncio.Event = field(default_factory=asyncio.Event)

    def on_message(self, message: AnyMessage) -> None:
        """Record the time of a report that has a token for every sequence."""
        if isinstance(message, Report) and len(message.deltas) == self.num_sequences:
            self.times_s.append(time.perf_counter())
            if len(self.times_s) >= self._target:
                self._reached.set()

    async def pass_by(self, count: int) -> int:
        """Wait for ``count`` more steps; return the index of the last one."""
        self._target = len(self.times_s) + count
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
        longest = load.context + load.max_tokens
        blocks_each = num_blocks_for(longest, process.setup.block_size) + 1
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
    """Read the tokens as the HTTP handler of a client does."""
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
    """Trace at least ``num_steps`` steps, and ``EDGE`` steps before and after them."""
    call = process.worker.executor.call
    tracer = profile(activities=[ProfilerActivity.CUDA])
    await call(tracer.start)  # in the GPU thread, because a trace must stop where it started
    await steps.pass_by(num_steps + 2 * EDGE)
    await call(tracer.stop)
    return read_spans(tracer)


def read_spans(tracer: profile) -> list[Span]:
    """Return the spans on the device, in order of their starts."""
    results = tracer.profiler.kineto_results if tracer.profiler is not None else None
    if results is None:
        raise RuntimeError("the profiler has no results")
    spans = [
        Span(event.name(), event.start_ns(), event.start_ns() + event.duration_ns())
        for event in results.events()
        if event.device_type() == DeviceType.CUDA and _occupies(event.name())
    ]
    return sorted(spans, key=lambda span: span.start_ns)


def _occupies(name: str) -> bool:
    """Return whether a span is work, because a trace also contains waits for events."""
    return not name.endswith((" Sync", " Wait Event"))


class Idle(NamedTuple):
    """Idle time of the device in a trace."""

    profiled_step_ms: float
    busy_ms: float  # per step
    idle_share: float  # of all time
    between_steps_share: float  # of all time: from a step's last kernel to the next step's first
    gap_p50_us: float
    gap_p99_us: float
    gap_max_us: float
    gaps_per_step: float


def measure_idle(spans: Sequence[Span], num_steps: int) -> Idle:
    """Measure the idle time over ``num_steps`` steps of ``spans`` (in order of their starts).

    A step ends with the copy of its tokens to the host. The first ``EDGE`` steps are left out. Only
    gaps over 1 us count as gaps, but the shares include all idle time. Raises ``ValueError`` if the
    trace has too few steps.
    """
    ends_ns = sorted(span.end_ns for span in spans if "DtoH" in span.name)
    if len(ends_ns) <= EDGE + num_steps:
        raise ValueError(f"the trace has {len(ends_ns)} steps of {EDGE + num_steps + 1} needed")
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
    """Return the idle intervals of the window, ``[num_gaps, 2]``."""
    starts = np.append(times[:, 0], last_ns)
    busy_until = np.maximum.accumulate(np.append(first_ns, times[:, 1]))
    gaps = np.stack((busy_until, np.minimum(starts, last_ns)), axis=1)
    return gaps[gaps[:, 0] < gaps[:, 1]]


def _idle_around(gaps: np.ndarray, kernels: np.ndarray, bound_ns: int) -> int:
    """Return the idle time from the last kernel before ``bound_ns`` to the first after it."""
    after = int(np.searchsorted(kernels[:, 0], bound_ns))
    if after in (0, len(kernels)):
        return 0
    low_ns, high_ns = kernels[:after, 1].max(), kernels[after, 0]
    inside = np.clip(gaps, low_ns, max(low_ns, high_ns))
    return int((inside[:, 1] - inside[:, 0]).sum())


if __name__ == "__main__":
    main()
