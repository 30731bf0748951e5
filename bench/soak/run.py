"""Run: ``python -m bench.soak`` sends mixed requests with floods in between and looks for leaks.

    python -m bench.soak --output soak --figure docs/figures/soak.png
        --document docs/operations.md

Without --url it starts a server with a tiny random model on the CPU. It writes soak.json, the
server's log and the figure, prints a table and puts it into the document. It ends with status 1 if
an answer was wrong or anything leaked.
"""

from __future__ import annotations

import argparse
import asyncio
import random
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass
from pathlib import Path

import aiohttp
import uvloop

from bench.soak.answers import Checker
from bench.soak.client import Target
from bench.soak.figure import draw
from bench.soak.floods import Flooder
from bench.soak.monitor import Monitor, Sample, at_rest, find_ranks
from bench.soak.recipes import draw_recipes
from bench.soak.report import Report, put_table, read_metrics
from bench.soak.server import MAX_WAITING, log_path, soak_job
from bench.soak.tally import Tally
from bench.soak.traffic import Traffic
from bench.soak.verdict import (
    find_growth,
    find_leaks,
    find_log_errors,
    find_missing,
    measure_growth,
)

REST_S = 60.0
_REST_INTERVAL_S = 0.5


@dataclass(frozen=True, slots=True)
class Options:
    """The size and the mix of a soak, and how much memory it may cost."""

    requests: int = 20_000
    clients: int = 64
    flood_every: int = 2000
    seed: int = 0
    recipes: int = 400
    max_waiting: int = MAX_WAITING
    body_bytes: int = 3 << 20
    half_open: int = 300
    slow_readers: int = 4
    hold_s: float = 3.0
    max_mib_per_1000: float = 2.0
    max_rise_mib: float = 1024.0


class Soak:
    """One run against a server that accepts requests."""

    def __init__(self, target: Target, pids: Mapping[int, int], options: Options) -> None:
        self._target, self._options = target, options
        self._tally = Tally()
        self._monitor = Monitor(target, pids, self._tally)

    async def run(self) -> Report:
        """Send everything, wait until the server is idle, and judge."""
        options, tally, monitor = self._options, self._tally, self._monitor
        async with self._target.session() as session:
            before, metrics = await self._rest(session, None), await self._metrics(session)
            sampling = asyncio.create_task(monitor.run())
            await self._send()
            duration_s = tally.now_s
            sampling.cancel()
            with suppress(asyncio.CancelledError):  # another error means that samples are missing
                await sampling
            after = await self._rest(session, before)
            missing = find_missing(await self._metrics(session), metrics)
        samples = [before, *monitor.samples, after]
        growth = measure_growth(samples, tally.phases)
        wrong = [f"{tally.num_wrong} wrong answers"] if tally.num_wrong else []
        leaks = find_leaks(before, after)
        leaks += find_growth(growth, options.max_mib_per_1000, options.max_rise_mib)
        return Report(
            options=asdict(options),
            duration_s=duration_s,
            kinds=tally.kinds,
            statuses=tally.statuses,
            flood_statuses=tally.flood_statuses,
            phases=tally.phases,
            growth=growth,
            failures=[*wrong, *tally.wrong, *leaks, *missing],
            samples=samples,
            probes=monitor.probes,
        )

    async def _send(self) -> None:
        options, tally = self._options, self._tally
        recipes = draw_recipes(random.Random(f"{options.seed} recipes"), options.recipes)
        traffic = Traffic(self._target, recipes, Checker(), tally, options.seed)
        flooding = asyncio.create_task(self._flood())
        await traffic.run(options.requests, options.clients)
        if traffic.broken:
            flooding.cancel()
        await asyncio.wait([flooding])
        if not flooding.cancelled():
            flooding.result()

    async def _flood(self) -> None:
        options = self._options
        flooder = Flooder(
            self._target,
            max_waiting=options.max_waiting,
            body_bytes=options.body_bytes,
            num_half_open=options.half_open,
            num_slow=options.slow_readers,
            hold_s=options.hold_s,
        )
        for number in range(options.flood_every, options.requests, options.flood_every):
            await self._tally.reached(number)
            print(f"{self._tally.describe()}; flooding", flush=True)
            await flooder.run(self._tally, random.Random(f"{options.seed} flood {number}"))

    async def _rest(self, session: aiohttp.ClientSession, before: Sample | None) -> Sample:
        """Sample until the server is idle and as it was ``before``, at most for ``REST_S``."""
        deadline_s = self._tally.now_s + REST_S
        while True:
            sample = await self._monitor.sample(session)
            rested = at_rest(sample.replicas) and all(one["num_blocks"] for one in sample.replicas)
            if before is not None:
                rested = not find_leaks(before, sample)
            if rested or self._tally.now_s > deadline_s:
                return sample
            await asyncio.sleep(_REST_INTERVAL_S)

    async def _metrics(self, session: aiohttp.ClientSession) -> dict[str, float]:
        try:
            async with session.get("/metrics") as response:
                return read_metrics(await response.text())
        except (aiohttp.ClientError, OSError):
            return {}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit status."""
    parser = _parser()
    args = parser.parse_args(argv)
    if args.url is None and args.pid is not None:
        parser.error("--pid belongs to --url")
    if args.url is not None and args.server_options:
        parser.error("the server at --url takes no options")
    options = Options(**{name: getattr(args, name) for name in _HELP})
    print(f"seed {options.seed}", flush=True)
    if args.document is not None:
        put_table(args.document.read_text(encoding="utf-8"), "")  # raises before the run
    args.output.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        url, pid = args.url, args.pid
        if url is None:
            job = soak_job(args.output, args.ranks, args.server_options)
            url = stack.enter_context(job).base_urls[0]
        pids = find_ranks(pid) if pid is not None or args.url is None else {}
        soak = Soak(Target(url.rstrip("/"), args.api_key), pids, options)
        report = uvloop.run(soak.run())
        if args.url is None:  # read before the end, because torchrun reports its SIGTERM
            report = report.with_failures(find_log_errors(log_path(args.output).read_text()))
    _write(report, args.output, args.figure or args.output / "soak.png", args.document)
    return 1 if report.failures else 0


def _write(report: Report, folder: Path, figure: Path, document: Path | None) -> None:
    report.write(folder / "soak.json")
    draw(report, figure)
    if document is not None:
        text = put_table(document.read_text(encoding="utf-8"), report.table())
        document.write_text(text, encoding="utf-8")
    print(report.table(), report.outcome(), sep="\n\n")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m bench.soak",
        description="Send mixed requests with floods in between and look for leaks.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add, defaults = parser.add_argument, Options()
    add("--output", type=Path, required=True, help="folder for soak.json and the server's log")
    add("--figure", type=Path, help="the figure's path; None: soak.png in the folder")
    add("--document", type=Path, help="a Markdown file with a place for the table")
    add("--url", help="a running server; None: start one on the CPU")
    add("--pid", type=int, help="process id of its torchrun, to sample its ranks")
    add("--api-key", help="the key of that server")
    add("--ranks", type=int, default=2, help="ranks of the server to start")
    add("server_options", nargs="*", help="further options of the server to start, after --")
    for name, text in _HELP.items():
        kind = type(getattr(defaults, name))
        option = "--" + name.replace("_", "-")
        add(option, type=kind, default=getattr(defaults, name), help=text)
    return parser


_HELP = {
    "requests": "mixed requests",
    "clients": "requests in flight at once",
    "flood_every": "mixed requests between two phases of floods",
    "seed": "of everything that is drawn",
    "recipes": "different requests; the answers to one must be equal",
    "max_waiting": "--max-waiting of the server; one flood sends twice as many requests",
    "body_bytes": "size of a flood's bodies",
    "half_open": "connections with half a head",
    "slow_readers": "clients that ask for a stream and do not read it",
    "hold_s": "how long these connections are held",
    "max_mib_per_1000": "memory that a rank may grow by per 1000 requests",
    "max_rise_mib": "memory that a rank may use beyond what it used at first, floods included",
}
