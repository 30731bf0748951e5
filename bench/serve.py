"""``python -m bench.serve``: load on any OpenAI-compatible server, and what it did with it."""

from __future__ import annotations

import argparse
import asyncio
import math
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import msgspec
import uvloop
from tqdm import tqdm

from bench.load.client import Client, RequestFailed, Target, find_model
from bench.load.fleet import LoadFailed, run_fleet
from bench.load.lengths import NAMED
from bench.load.monitor import Monitor
from bench.load.prompts import PromptMaker
from bench.load.record import Record
from bench.load.report import Objectives, run_file
from bench.load.table import render
from bench.load.workload import TRACES, PlannedRequest, WorkloadOptions, make_plan

TOKENS_PER_PROCESS = 10_000  # per second, that one load process receives without falling behind
ARRIVALS = ("poisson", "gamma", "uniform", "closed", "trace")


class RunFailed(Exception):
    """There is nothing to report; the text says why."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run as the command line says; the exit status."""
    parser = make_parser()
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
    except KeyboardInterrupt:
        print("interrupted: no report", file=sys.stderr)
        return 130
    _deliver(run, args)
    return 0 if run["summary"]["num_completed"] else 1


def make_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.serve", description=__doc__, allow_abbrev=False
    )
    _add_target(parser.add_argument_group("server"))
    _add_workload(parser.add_argument_group("what is sent"))
    _add_arrivals(parser.add_argument_group("when it is sent"))
    _add_report(parser.add_argument_group("report"))
    return parser


def _add_target(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add("--base-url", nargs="+", required=True, metavar="URL", help="several take turns")
    add("--model", help="served name; default: the first that the server lists")
    add("--api-key", default=os.environ.get("OPENAI_API_KEY"), help="default: $OPENAI_API_KEY")
    add("--endpoint", choices=("completions", "chat"), default="completions")
    add("--no-ignore-eos", action="store_true", help="let answers end where the model ends them")
    add("--count-by", choices=("usage", "token-ids"), default="usage", help="how tokens are told")
    add("--extra-body", type=_json_object, default={}, metavar="JSON",
        help="more fields of every request; null takes one away")  # fmt: skip


def _add_workload(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    kinds = ("fixed", "uniform", "lognormal", *NAMED, *TRACES)
    add("--workload", choices=kinds, default="fixed")
    add("--input-len", type=int, metavar="TOKENS", help="of a prompt; a mean unless fixed")
    add("--output-len", type=int, metavar="TOKENS", help="of an answer; a mean unless fixed")
    add("--length-spread", type=float, metavar="SHARE",
        help="uniform: +- of the mean; lognormal: deviation over mean; default: 0.5")  # fmt: skip
    add("--trace", metavar="FILE", help="of the mooncake, azure and prompts workloads")
    add("--max-model-len", type=int, metavar="TOKENS", help="cut longer requests to fit")
    add("--token-ids", type=int, nargs=2, default=(1000, 30000), metavar=("LOW", "HIGH"),
        help="prompts are of these; default: 1000 30000, in every vocabulary")  # fmt: skip
    add("--num-requests", type=int, help="default: what the duration or the trace has, else 100")
    add("--seed", type=int, default=0)


def _add_arrivals(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add("--arrivals", choices=ARRIVALS, default="poisson")
    add("--rate", type=float, metavar="RPS", help="requests per second; traces are scaled to it")
    add("--cv", type=float, help="coefficient of variation of gamma gaps")
    add("--concurrency", type=int, metavar="N", help="closed: so many at a time")
    add("--time-scale", type=float, default=1.0, help="stretches a trace's times")
    add("--duration-s", type=float, metavar="S", help="nothing is sent after")
    add("--num-warmups", type=int, default=1, metavar="N", help="sent before, one by one")
    add("--processes", type=int, default=0, metavar="N", help="default: as the rate needs")


def _add_report(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add("--ttft-slo", type=float, metavar="S", help="objective for the time to the first token")
    add("--tpot-slo", type=float, metavar="S", help="objective for the time per output token")
    add("--output", type=Path, metavar="FILE", help="the whole run as JSON")
    add("--plots", type=Path, metavar="FOLDER", help="figures of the run as PNG and SVG")
    add("--monitor-interval-s", type=float, default=0.5, metavar="S",
        help="how often queues and memory of the server are read; 0: never")  # fmt: skip
    add("--quiet", action="store_true", help="no progress bar, no table")


def _json_object(text: str) -> dict[str, Any]:
    try:
        found = msgspec.json.decode(text)
    except msgspec.DecodeError as error:
        raise argparse.ArgumentTypeError(f"not JSON: {error}") from error
    if not isinstance(found, dict):
        raise argparse.ArgumentTypeError("a JSON object is wanted")
    return found


def workload_options(args: argparse.Namespace) -> WorkloadOptions:
    return WorkloadOptions(
        workload=args.workload,
        input_len=args.input_len,
        output_len=args.output_len,
        length_spread=args.length_spread,
        trace=args.trace,
        max_model_len=args.max_model_len,
        arrivals=args.arrivals,
        rate=args.rate,
        cv=args.cv,
        concurrency=args.concurrency,
        time_scale=args.time_scale,
        num_requests=args.num_requests,
        duration_s=args.duration_s,
        seed=args.seed,
        token_ids=tuple(args.token_ids),
    )


async def _run(
    args: argparse.Namespace, workload: WorkloadOptions, plan: Sequence[PlannedRequest]
) -> dict[str, Any]:
    target = await _make_target(args)
    await _warm_up(target, workload, plan[: args.num_warmups])
    num_processes = args.processes or _num_processes(workload, plan)
    monitor = Monitor(target.base_urls, target.headers, args.monitor_interval_s)
    progress = _Progress(len(plan), quiet=args.quiet)
    begun: asyncio.Future[float] = asyncio.get_running_loop().create_future()

    def begin(start_s: float) -> None:
        begun.set_result(start_s)

    async def watch() -> None:
        start_s = await begun
        if args.monitor_interval_s > 0:
            await monitor.run(start_s)

    try:
        async with asyncio.TaskGroup() as group:
            watching = group.create_task(watch())
            await run_fleet(target, workload, num_processes, begin, progress.add)
            watching.cancel()
    except* LoadFailed as failed:
        raise RunFailed("a load process died; its traceback is above") from failed
    finally:
        progress.close()
    head = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": ["python", "-m", "bench.serve", *args.argv],
        "target": {"base_urls": target.base_urls, "model": target.model},
        "workload": workload.describe() | {"num_requests": len(plan), "processes": num_processes},
    }
    objectives = Objectives(args.ttft_slo, args.tpot_slo)
    return run_file(head, progress.records, begun.result(), objectives, monitor.samples)


class _Progress:
    """The records so far, and a bar on the terminal that counts them."""

    def __init__(self, total: int, quiet: bool) -> None:
        self.records: list[Record] = []
        self._num_failed = 0
        # Without a terminal a bar would fill a log.
        self._bar = tqdm(total=total, unit="req", disable=True if quiet else None)

    def add(self, record: Record) -> None:
        """One more request has ended."""
        self.records.append(record)
        self._bar.update()
        if record.error is not None:
            self._num_failed += 1
            self._bar.set_postfix(failed=self._num_failed)

    def close(self) -> None:
        """No more come."""
        self._bar.close()


async def _make_target(args: argparse.Namespace) -> Target:
    base_urls = tuple(url.rstrip("/").removesuffix("/v1") for url in args.base_url)
    chat = args.endpoint == "chat"
    if chat and args.workload != "prompts":
        raise RunFailed("chats are of text: they need the prompts workload")
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
    """Send some requests one by one, to every copy of the server; ``RunFailed`` if one fails.

    Their prompts are not those of the run, which a prefix cache would remember.
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
    """As many as the planned tokens per second ask for, within this machine's processors."""
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
        # Not needed otherwise, and an optional package.
        from bench.load.plots import draw_run

        for path in draw_run(run, args.plots):
            print(path)


if __name__ == "__main__":
    raise SystemExit(main())
