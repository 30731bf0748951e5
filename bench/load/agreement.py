"""Agreement: compares the figures of ``bench.serve`` with those of guidellm.

Both are recomputed from the times of single requests in the files; the medians are over all
answered requests. guidellm (reports of version 0.8.1) names some figures differently:

- Its ITL is one mean per request, ``(last token - first token) / (output tokens - 1)``. This
  package calls that TPOT.
- Its TPOT includes the first token: ``(last token - send) / output tokens``.
- It keeps no times of single tokens, so the distribution of ITL cannot be compared.
- Its clock starts when a request's header is written, after the connection is open; it counts only
  chunks with text as tokens.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import msgspec
from msgspec import Struct

_WIDTH = 14
_LABEL_WIDTH = 34


class Answer(Struct, frozen=True, kw_only=True):
    """One request that was answered in full. Times are seconds of any clock, the same for all."""

    scheduled_s: float | None
    sent_s: float
    first_token_s: float
    last_token_s: float
    end_s: float
    num_prompt_tokens: int
    num_output_tokens: int

    @property
    def lateness_s(self) -> float | None:
        """How long after its scheduled time the request was sent."""
        return None if self.scheduled_s is None else self.sent_s - self.scheduled_s

    @property
    def ttft_s(self) -> float:
        """From the actual send to the first token."""
        return self.first_token_s - self.sent_s

    @property
    def tpot_s(self) -> float | None:
        """Mean time per output token after the first; guidellm's ``inter_token_latency_ms``."""
        if self.num_output_tokens < 2:
            return None
        return (self.last_token_s - self.first_token_s) / (self.num_output_tokens - 1)

    @property
    def time_per_token_s(self) -> float | None:
        """Send to last token, divided by all tokens; guidellm's ``time_per_output_token_ms``."""
        return self.e2e_s / self.num_output_tokens if self.num_output_tokens else None

    @property
    def e2e_s(self) -> float:
        """From the actual send to the last token."""
        return self.last_token_s - self.sent_s

    @property
    def latency_s(self) -> float:
        """From the actual send to the end of the stream; guidellm's ``request_latency``."""
        return self.end_s - self.sent_s


@dataclass(frozen=True, slots=True)
class Run:
    """The requests of one report."""

    label: str
    tool: str  # "guidellm" or "ours"
    answers: Sequence[Answer]
    failures: Counter[str]

    def median_ms(self, figure: Callable[[Answer], float | None]) -> float:
        """Return the median over all answers in milliseconds; NaN if none has the figure."""
        values = [value for answer in self.answers if (value := figure(answer)) is not None]
        return median(values) * 1e3 if values else math.nan


FIGURES: tuple[tuple[str, Callable[[Answer], float | None]], ...] = (
    ("TTFT from the actual send", lambda answer: answer.ttft_s),
    ("TPOT after the first (its ITL)", lambda answer: answer.tpot_s),
    ("time per token (its TPOT)", lambda answer: answer.time_per_token_s),
    ("send to last token", lambda answer: answer.e2e_s),
    ("send to end of stream (latency)", lambda answer: answer.latency_s),
    ("lateness of sends", lambda answer: answer.lateness_s),
)


# The structs have only the fields that are used, so encoding a report again makes it smaller.
class _Timings(Struct):
    targeted_start: float | None = None
    request_start: float | None = None
    first_token_iteration: float | None = None
    last_token_iteration: float | None = None
    token_iterations: int = 0
    request_end: float | None = None


class _Info(Struct):
    timings: _Timings
    error: str | None = None


class _GuidellmRequest(Struct):
    info: _Info
    prompt_tokens: int | None = None
    output_tokens: int | None = None


class _ByStatus(Struct):
    successful: list[_GuidellmRequest] = []
    errored: list[_GuidellmRequest] = []
    incomplete: list[_GuidellmRequest] = []


class _Benchmark(Struct):
    requests: _ByStatus


class _GuidellmReport(Struct):
    benchmarks: list[_Benchmark]


class _OurRequest(Struct):
    scheduled_s: float
    sent_s: float
    end_s: float
    first_token_s: float | None = None
    last_token_s: float | None = None
    num_prompt_tokens: int = 0
    num_output_tokens: int = 0
    error: str | None = None


class _OurRun(Struct):
    requests: list[_OurRequest]


class _Kind(Struct):
    benchmarks: msgspec.Raw | msgspec.UnsetType = msgspec.UNSET


def read(path: Path) -> Run:
    """Read a report of guidellm (reduced or not) or a run file of ``bench.serve``.

    Raises ``ValueError`` with one line if it is neither.
    """
    content = path.read_bytes()
    try:
        if msgspec.json.decode(content, type=_Kind).benchmarks is msgspec.UNSET:
            return _our_run(path.stem, msgspec.json.decode(content, type=_OurRun))
        return _guidellm_run(path.stem, msgspec.json.decode(content, type=_GuidellmReport))
    except msgspec.MsgspecError as error:
        raise ValueError(f"{path} is no report of guidellm or bench.serve: {error}") from error


def reduce_guidellm(content: bytes) -> bytes:
    """Reduce a guidellm report to the fields that ``read`` needs: some 300 bytes per request."""
    return msgspec.json.encode(msgspec.json.decode(content, type=_GuidellmReport))


def _guidellm_run(label: str, report: _GuidellmReport) -> Run:
    answers: list[Answer] = []
    failures: Counter[str] = Counter()
    for benchmark in report.benchmarks:
        found = benchmark.requests
        for request in found.successful:
            answer = _guidellm_answer(request)
            if answer is None:
                failures["no token with text"] += 1
            else:
                answers.append(answer)
        failures.update(request.info.error or "unknown error" for request in found.errored)
        failures.update("incomplete" for _ in found.incomplete)
    return Run(label, "guidellm", answers, failures)


def _guidellm_answer(request: _GuidellmRequest) -> Answer | None:
    times = request.info.timings
    sent_s, end_s = times.request_start, times.request_end
    first_s, last_s = times.first_token_iteration, times.last_token_iteration
    if sent_s is None or end_s is None or first_s is None or last_s is None:
        return None
    return Answer(
        scheduled_s=times.targeted_start,
        sent_s=sent_s,
        first_token_s=first_s,
        last_token_s=last_s,
        end_s=end_s,
        num_prompt_tokens=request.prompt_tokens or 0,
        num_output_tokens=request.output_tokens or times.token_iterations,
    )


def _our_run(label: str, run: _OurRun) -> Run:
    answers: list[Answer] = []
    failures: Counter[str] = Counter()
    for request in run.requests:
        if request.error is not None or request.first_token_s is None:
            failures[request.error or "no token"] += 1
        else:
            answers.append(msgspec.convert(request, Answer, from_attributes=True))
    return Run(label, "ours", answers, failures)


def render(runs: Sequence[Run]) -> str:
    """Return a table of medians, one column a run; with runs of both tools also their ratio."""
    return "\n".join([*_medians(runs), "", *_counts(runs), *_failures(runs)])


def _medians(runs: Sequence[Run]) -> Iterator[str]:
    by_tool = [_pool(runs, tool) for tool in ("ours", "guidellm")]
    compared = all(run.answers for run in by_tool)
    heads = [run.label for run in runs] + ["ours/guidellm"] * compared
    yield _row("medians, ms", (f"{head[: _WIDTH - 1]:>{_WIDTH}}" for head in heads))
    for label, figure in FIGURES:
        cells = [f"{run.median_ms(figure):>{_WIDTH}.2f}" for run in runs]
        if compared:
            ours_ms, guidellm_ms = (run.median_ms(figure) for run in by_tool)
            ratio = ours_ms / guidellm_ms if guidellm_ms else math.nan
            cells.append(f"{ratio:>{_WIDTH}.4f}")
        yield _row(label, cells)


def _pool(runs: Sequence[Run], tool: str) -> Run:
    answers = [answer for run in runs if run.tool == tool for answer in run.answers]
    return Run(tool, tool, answers, Counter())


def _counts(runs: Sequence[Run]) -> Iterator[str]:
    def row(label: str, count: Callable[[Run], float]) -> str:
        return _row(label, (f"{count(run):>{_WIDTH}}" for run in runs))

    yield row("requests answered", lambda run: len(run.answers))
    yield row("requests failed", lambda run: run.failures.total())
    yield row("requests per second sent", _offered_rps)
    yield row("prompt tokens", lambda run: sum(a.num_prompt_tokens for a in run.answers))
    yield row("output tokens", lambda run: sum(a.num_output_tokens for a in run.answers))


def _offered_rps(run: Run) -> float:
    times = [answer.sent_s for answer in run.answers]
    span_s = max(times, default=0.0) - min(times, default=0.0)
    return round((len(times) - 1) / span_s, 4) if span_s > 0 else math.nan


def _failures(runs: Sequence[Run]) -> Iterator[str]:
    for run in runs:
        for reason, count in run.failures.most_common():
            yield f"{run.label}: {count} failed: {reason}"


def _row(label: str, cells: Iterable[str]) -> str:
    return f"{label:<{_LABEL_WIDTH}}" + "".join(cells)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit status."""
    parser = argparse.ArgumentParser(description="Compare bench.serve runs with guidellm reports.")
    parser.add_argument(
        "files",
        nargs="+",
        type=Path,
        metavar="FILE",
        help="run files of bench.serve and reports of guidellm",
    )
    parser.add_argument("--reduce", type=Path, metavar="OUT",
        help="also write the one FILE, a guidellm report, without unused fields")  # fmt: skip
    args = parser.parse_args(argv)
    if args.reduce is not None and len(args.files) != 1:
        parser.error("--reduce takes one FILE")
    try:
        runs = [read(path) for path in args.files]
        if args.reduce is not None:
            if runs[0].tool != "guidellm":
                parser.error(f"--reduce: {args.files[0]} is no report of guidellm")
            args.reduce.write_bytes(reduce_guidellm(args.files[0].read_bytes()))
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(render(runs))
    return 0 if all(run.answers for run in runs) else 1


if __name__ == "__main__":
    raise SystemExit(main())
