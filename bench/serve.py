"""Send load to an OpenAI-compatible server; report latency, throughput and SLO attainment."""

from __future__ import annotations

import argparse
import asyncio
import math
import os
import signal
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any

import msgspec
import uvloop
from tqdm import tqdm

from bench.load.client import Client, RequestFailed, Target, find_model
from bench.load.fleet import LoadFailed, run_fleet
from bench.load.monitor import Monitor
from bench.load.options import make_parser, workload_options
from bench.load.prompts import PromptMaker
from bench.load.record import Record
from bench.load.report import Objectives, run_file
from bench.load.table import render
from bench.load.workload import PlannedRequest, WorkloadOptions, make_plan

INTERRUPTED = 130  # exit status
TOKENS_PER_PROCESS = 10_000  # tokens per second that one load process receives without delay


class RunFailed(Exception):
    """The run gave no report; the text says why."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit status."""
    parser = make_parser(__doc__)
    args = parser.parse_args(argv)
    args.argv = list(sys.argv[1:] if argv is None else argv)
    workload = workload_options(args)
    try:
        plan = make_plan(workload)
    except (ValueError, OSError) as error:
        parser.error(str(error))
    try:
        run = uvloop.run(_run(args, workload, plan))
    except (RunFailed, RequestFailed) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except (KeyboardInterrupt, asyncio.CancelledError):
        print("interrupted: no report", file=sys.stderr)
        return INTERRUPTED
    _deliver(run, args)
    if run["interrupted"]:
        return INTERRUPTED
    return 0 if run["summary"]["num_completed"] else 1


async def _run(
    args: argparse.Namespace, workload: WorkloadOptions, plan: Sequence[PlannedRequest]
) -> dict[str, Any]:
    target = await _make_target(args)
    await _warm_up(target, workload, plan[: args.num_warmups])
    num_processes = args.processes or _num_processes(workload, plan)
    monitor = Monitor(target.base_urls, target.headers, args.monitor_interval_s)
    progress = _Progress(len(plan), quiet=args.quiet)
    started: asyncio.Future[float] = asyncio.get_running_loop().create_future()
    stop = asyncio.Event()

    def start(start_s: float) -> None:
        started.set_result(start_s)
        _on_ctrl_c(stop)

    async def watch() -> None:
        start_s = await started
        if args.monitor_interval_s > 0:
            await monitor.run(start_s)

    try:
        async with asyncio.TaskGroup() as group:
            watching = group.create_task(watch())
            await run_fleet(target, workload, num_processes, start, progress.add, stop)
            watching.cancel()
    except* LoadFailed as failed:
        raise RunFailed("a load process died; its traceback is above") from failed
    finally:
        progress.close()
    if stop.is_set() and not progress.records:
        raise asyncio.CancelledError
    head = {
        "interrupted": stop.is_set(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": ["python", "-m", "bench.serve", *args.argv],
        "target": {"base_urls": target.base_urls, "model": target.model},
        "workload": workload.describe() | {"num_requests": len(plan), "processes": num_processes},
    }
    objectives = Objectives(args.ttft_slo, args.tpot_slo)
    return run_file(head, progress.records, started.result(), objectives, monitor.samples)


def _on_ctrl_c(stop: asyncio.Event) -> None:
    """Let the first Ctrl-C set ``stop``, so that what was measured is reported.

    The second cancels the running task.
    """
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        return  # the shell runs it in the background
    task = asyncio.current_task()
    assert task is not None

    def interrupt() -> None:
        if stop.is_set():
            task.cancel()
        stop.set()

    asyncio.get_running_loop().add_signal_handler(signal.SIGINT, interrupt)


class _Progress:
    """Collects the records and counts them in a progress bar."""

    def __init__(self, total: int, quiet: bool) -> None:
        self.records: list[Record] = []
        self._num_failed = 0
        # None disables the bar without a terminal, because it would fill a log.
        self._bar = tqdm(total=total, unit="req", disable=True if quiet else None)

    def add(self, record: Record) -> None:
        self.records.append(record)
        self._bar.update()
        if record.error is not None:
            self._num_failed += 1
            self._bar.set_postfix(failed=self._num_failed)

    def close(self) -> None:
        self._bar.close()


async def _make_target(args: argparse.Namespace) -> Target:
    base_urls = tuple(url.rstrip("/").removesuffix("/v1") for url in args.base_url)
    chat = args.endpoint == "chat"
    if chat and args.workload != "prompts":
        raise RunFailed("--endpoint chat needs --workload prompts, because messages are text")
    target = Target(
        base_urls=base_urls,
        model=args.model or "",
        api_key=args.api_key,
        chat=chat,
        ignore_eos=not args.no_ignore_eos,
        token_ids=args.count_by == "token-ids",
        extra_body=args.extra_body,
    )
    if args.model:
        return target
    return replace(target, model=await find_model(base_urls[0], target.headers))


async def _warm_up(
    target: Target, workload: WorkloadOptions, requests: Sequence[PlannedRequest]
) -> None:
    """Send each of ``requests`` to every copy of the server, one by one.

    Their prompts differ from those of the run, because a prefix cache would keep them. Raises
    ``RunFailed`` if one fails.
    """
    maker = PromptMaker(workload.seed + 1, *workload.token_ids)
    async with Client(target) as client:
        for request in requests:
            body = target.body(request.make_prompt(maker), request.max_tokens)
            for copy in range(len(target.base_urls)):
                now_s = time.monotonic()
                record = Record(index=copy, scheduled_s=now_s, sent_s=now_s)
                await client.send(record, body)
                if record.error is not None:
                    raise RunFailed(f"warm-up failed: {record.error}")


def _num_processes(workload: WorkloadOptions, plan: Sequence[PlannedRequest]) -> int:
    """Return how many processes the planned output tokens per second need.

    At least 1, at most one fewer than this machine has processors.
    """
    times = [request.send_s for request in plan if request.send_s is not None]
    if len(times) < 2 or times[-1] <= times[0]:
        return 1
    tokens_per_s = sum(request.max_tokens for request in plan) / (times[-1] - times[0])
    return max(1, min(math.ceil(tokens_per_s / TOKENS_PER_PROCESS), (os.cpu_count() or 1) - 1))


def _deliver(run: dict[str, Any], args: argparse.Namespace) -> None:
    if args.output is not None:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        args.output.write_bytes(msgspec.json.encode(run))
    if not args.quiet:
        print(render(run))
    if args.plots is not None:
        # Imported here because matplotlib is an optional package.
        from bench.load.plots import draw_run

        for path in draw_run(run, args.plots):
            print(path)


if __name__ == "__main__":
    raise SystemExit(main())
