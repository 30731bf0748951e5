"""Summary: the results of a sweep, as JSON and as Markdown tables."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from bench.load.table import LATE_S
from bench.sweep.experiment import Experiment
from bench.sweep.knee import goodput

Run = dict[str, Any]
Json = dict[str, Any]

_LATENCIES = ("ttft_s", "tpot_s", "itl_s", "e2e_s", "queueing_s")
_STATS = ("mean", "p50", "p90", "p99")
_COUNTS = (
    "num_requests",
    "num_completed",
    "num_errors",
    "errors",
    "num_short",
    "offered_rps",
    "request_throughput_rps",
    "input_tokens_per_s",
    "output_tokens_per_s",
    "goodput_rps",
)


@dataclass(frozen=True, slots=True)
class Measured:
    """One configuration with its run files, by rising rate."""

    name: str
    num_gpus: int
    runs: tuple[Run, ...]
    complete: bool = False
    failure: str | None = None  # why it could not be completed; several lines

    @property
    def attainments(self) -> dict[float, float]:
        """Joint SLO attainment by rate [req/s]."""
        return {rate_of(run): run["summary"]["attainment"]["joint"] for run in self.runs}

    def completed(self) -> Measured:
        """Return a copy marked as complete."""
        return replace(self, complete=True)


def rate_of(run: Run) -> float:
    """Return the rate [req/s] that was requested for a run."""
    return float(run["workload"]["rate"])


def summarise_sweep(experiment: Experiment, measured: Sequence[Measured]) -> Json:
    """Return the content of ``summary.json``. Rates are [req/s] of a whole configuration.

    ``rate`` is the requested rate; ``offered_rps`` is the rate of the arrivals that were drawn. The
    knee is bisected at the first goal only, so goodput at the other goals is only as exact as the
    spacing of the points. A goodput of null means that the lowest measured rate misses the goal.
    ``knee_found`` is false if every measured rate reaches the goal, so goodput may be higher. Then
    ``rps`` is what the server is known to hold at least: the highest rate, or the requests that it
    answered per second if they were fewer. A short run with loose objectives can meet them while
    its queue grows, so the rate alone proves nothing.
    """
    return {
        "name": experiment.name,
        "description": experiment.description,
        "objectives": {
            "ttft_s": experiment.objectives.ttft_s,
            "tpot_s": experiment.objectives.tpot_s,
        },
        "goals": experiment.goals,
        "configurations": [_configuration(one, experiment.goals) for one in measured],
    }


def _configuration(measured: Measured, goals: Sequence[float]) -> Json:
    return {
        "name": measured.name,
        "num_gpus": measured.num_gpus,
        "status": _status(measured),
        "failure": measured.failure,
        "goodput": {str(goal): _goodput(measured, goal) for goal in goals},
        "points": [_point(run) for run in measured.runs],
    }


def _status(measured: Measured) -> str:
    if measured.failure is not None:
        return "failed"
    if measured.complete:
        return "complete"
    return "incomplete" if measured.runs else "not started"


def _goodput(measured: Measured, goal: float) -> Json:
    points = measured.attainments
    found = goodput(points, goal)
    knee_found = any(share < goal for share in points.values())
    if found is not None and not knee_found:
        found = min(found, max(run["summary"]["request_throughput_rps"] for run in measured.runs))
    return {
        "rps": found,
        "per_gpu_rps": None if found is None else found / measured.num_gpus,
        "knee_found": knee_found,
    }


def _point(run: Run) -> Json:
    summary = run["summary"]
    lateness = summary["lateness_s"]
    return {
        "rate": rate_of(run),
        "attainment": summary["attainment"],
        **{name: summary[name] for name in _COUNTS},
        **{name: _stats(summary[name]) for name in _LATENCIES},
        "lateness_p99_s": None if lateness is None else lateness["p99"],
        "date": run["date"],
    }


def _stats(distribution: Mapping[str, float] | None) -> dict[str, float] | None:
    return None if distribution is None else {name: distribution[name] for name in _STATS}


def render_sweep(summary: Mapping[str, Any]) -> str:
    """Return ``summary.md``: the goodput of each configuration, then the points of each."""
    lines = [f"# {summary['name']}", ""]
    if summary["description"]:
        lines += [summary["description"].strip(), ""]
    objectives = " and ".join(
        f"{label} within {summary['objectives'][key] * 1e3:g} ms"
        for label, key in (("TTFT", "ttft_s"), ("TPOT", "tpot_s"))
        if summary["objectives"][key] is not None
    )
    lines += [f"Objectives: {objectives}. Rates are requests per second.", ""]
    lines += _goodput_table(summary)
    for one in summary["configurations"]:
        lines += ["", f"## {one['name']}", ""]
        if one["failure"] is not None:
            lines += ["Failed:", "", *(f"    {line}" for line in one["failure"].splitlines()), ""]
        lines += _points_table(one) if one["points"] else ["Nothing was measured."]
    return "\n".join(lines) + "\n"


def _goodput_table(summary: Mapping[str, Any]) -> Iterator[str]:
    head = ["configuration", "GPUs"]
    for goal in summary["goals"]:
        head += [f"goodput at {100 * goal:.4g} %", "per GPU"]
    yield from _head([*head, "status"])
    for one in summary["configurations"]:
        row = [one["name"], str(one["num_gpus"])]
        for goal in summary["goals"]:
            row += _goodput_cells(one, one["goodput"][str(goal)])
        yield _row([*row, one["status"]])


def _goodput_cells(configuration: Mapping[str, Any], found: Mapping[str, Any]) -> list[str]:
    points = configuration["points"]
    if not points:
        return ["-", "-"]
    if found["rps"] is None:
        lowest = points[0]["rate"]
        return [f"< {lowest:g}", f"< {lowest / configuration['num_gpus']:.4g}"]
    if found["knee_found"]:
        return [f"{found['rps']:g}", f"{found['per_gpu_rps']:.4g}"]
    return [f"≥ {found['rps']:.3g}", f"≥ {found['per_gpu_rps']:.3g}"]


def _points_table(configuration: Mapping[str, Any]) -> Iterator[str]:
    yield from _head(
        ["rate", "within both", "TTFT alone", "TPOT alone"]
        + [f"TTFT {name} [ms]" for name in ("mean", "P90", "P99")]
        + [f"TPOT {name} [ms]" for name in ("mean", "P90", "P99")]
        + ["ITL P99 [ms]", "E2E P90 [s]", "requests/s", "output tokens/s", "failed"]
    )
    notes = []
    for point in configuration["points"]:
        yield _row(_point_cells(point))
        late_s = point["lateness_p99_s"]
        if late_s is not None and late_s > LATE_S:
            notes.append(
                f"Rate {point['rate']:g}: 1 % of the sends were {late_s * 1e3:.0f} ms late or more."
            )
        for text, count in point["errors"].items():
            notes.append(f"Rate {point['rate']:g}: {count} failed: {text}")
    if notes:
        yield ""
        yield from (f"* {' '.join(note.split())}" for note in notes)


def _point_cells(point: Mapping[str, Any]) -> list[str]:
    shares = [f"{point['attainment'][name]:.1%}" for name in ("joint", "ttft", "tpot")]
    return [
        f"{point['rate']:g}",
        *shares,
        *(_milliseconds(point["ttft_s"], name) for name in ("mean", "p90", "p99")),
        *(_milliseconds(point["tpot_s"], name) for name in ("mean", "p90", "p99")),
        _milliseconds(point["itl_s"], "p99"),
        "-" if point["e2e_s"] is None else f"{point['e2e_s']['p90']:.2f}",
        f"{point['request_throughput_rps']:.2f}",
        f"{point['output_tokens_per_s']:.0f}",
        str(point["num_errors"]),
    ]


def _milliseconds(stats: Mapping[str, float] | None, name: str) -> str:
    return "-" if stats is None else f"{stats[name] * 1e3:.1f}"


def _head(cells: Sequence[str]) -> list[str]:
    return [_row(cells), "|" + "---|" * len(cells)]


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"
