"""Plot run: draws the latencies of one run, and the server's queues and KV use over time."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

from bench.load.plot_style import (
    E2E,
    ITL,
    TPOT,
    TTFT,
    Curve,
    Metric,
    add_legend,
    cdf_points,
    curve_style,
    draw_cdfs,
    new_figure,
)


def rate_of(run: Mapping[str, Any]) -> float | None:
    """Return the requested rate [req/s]; without one, the offered rate."""
    requested: float | None = run["workload"]["rate"]
    offered: float | None = run["summary"]["offered_rps"]
    return offered if requested is None else requested


def describe(run: Mapping[str, Any]) -> str:
    """Return model and load in one line."""
    workload, rate = run["workload"], rate_of(run)
    if workload["concurrency"] is not None:
        load = f"{workload['concurrency']} at a time"
    else:
        load = f"{workload['arrivals']} arrivals"
        load += f" at {rate:.4g} req/s" if rate is not None else ""
    count = len(run["requests"])
    return f"{run['target']['model']}: {count} requests, {workload['workload']}, {load}"


def latency_cdf(run: Mapping[str, Any]) -> Figure | None:
    """Draw the distribution of each latency in its own panel; None without an answered request."""
    curves = {metric: run_cdf(run, metric) for metric in (TTFT, TPOT, ITL, E2E)}
    curves = {metric: curve for metric, curve in curves.items() if curve[0].size}
    if not curves:
        return None
    num_columns = min(2, len(curves))
    num_rows = math.ceil(len(curves) / num_columns)
    figure = new_figure(describe(run), 0.6 + 2.5 * num_rows)
    panels = figure.subplots(num_rows, num_columns, squeeze=False).flat
    for axes, (metric, curve) in zip(panels, curves.items(), strict=False):
        of = "gaps between tokens" if metric is ITL else "requests"
        draw_cdfs(axes, metric, [curve], run["objectives"].get(metric.key))
        axes.set(ylabel=f"share of {of} [%]")
    for axes in list(figure.axes)[len(curves) :]:
        axes.remove()
    return figure


def run_cdf(run: Mapping[str, Any], metric: Metric) -> Curve:
    """Return the metric's values in its own unit, and the share [%] that is not larger."""
    if metric is ITL:
        quantiles = np.asarray(run["summary"]["itl_quantiles"] or (), dtype=np.float64)
        return quantiles * metric.per_second, np.linspace(0, 100, quantiles.size)
    good = [row[metric.key] for row in run["requests"] if row["error"] is None]
    values, shares = cdf_points(good)
    return values * metric.per_second, shares


def num_in_flight(
    requests: Iterable[Mapping[str, Any]], times_s: NDArray[np.float64]
) -> NDArray[np.int64]:
    """Count the requests that were sent and had not ended at each of the times [s]."""
    rows = list(requests)
    sent = np.sort([row["sent_s"] for row in rows])
    ended = np.sort([row["end_s"] for row in rows])
    return np.searchsorted(sent, times_s, "right") - np.searchsorted(ended, times_s, "right")


def timeline(run: Mapping[str, Any]) -> Figure | None:
    """Draw requests in flight, queues and KV use over time; None if the server was not sampled."""
    rows = [replica for sample in run["monitor"] for replica in sample["replicas"]]
    replicas = sorted({row["id"] for row in rows})
    if not replicas:
        return None
    panels: list[tuple[str, str, Callable[[Mapping[str, Any]], float | None]]] = [
        ("waiting in each replica", "requests", lambda row: row.get("num_waiting")),
        ("running in each replica", "requests", lambda row: row.get("num_running")),
        ("KV cache in use in each replica", "KV use [%]", _kv_use_percent),
    ]
    lines = [(title, label, _replica_lines(run, read)) for title, label, read in panels]
    lines = [panel for panel in lines if panel[2]]
    figure = new_figure(describe(run), 0.9 + 1.55 * (1 + len(lines)))
    columns = figure.subplots(1 + len(lines), 1, sharex=True, squeeze=False)[:, 0]
    _draw_in_flight(columns[0], run)
    for axes, (title, label, found) in zip(columns[1:], lines, strict=True):
        for replica, (times_s, values) in found.items():
            axes.plot(times_s, values, **curve_style(replicas.index(replica)))
        axes.set(title=title, ylabel=label, ylim=(0, None))
        if label.endswith("[%]"):
            axes.set(ylim=(0, 102), yticks=(0, 25, 50, 75, 100))
        else:
            axes.yaxis.set_major_locator(MaxNLocator(nbins=4, integer=True))
    columns[-1].set(xlabel="time since the start of the run [s]", xlim=(0, None))
    roles = {row["id"]: row["role"] for row in rows}
    names = [f"replica {replica} ({roles[replica]})" for replica in replicas]
    add_legend(figure, names, [curve_style(index) for index in range(len(replicas))])
    return figure


def _draw_in_flight(axes: Axes, run: Mapping[str, Any]) -> None:
    end_s = max((row["end_s"] for row in run["requests"]), default=0.0)
    times_s = np.linspace(0, end_s, 1001)
    axes.plot(times_s, num_in_flight(run["requests"], times_s), **curve_style(0))
    axes.set(title="in flight at the client", ylabel="requests", ylim=(0, None))
    axes.yaxis.set_major_locator(MaxNLocator(nbins=4, integer=True))


def _kv_use_percent(replica: Mapping[str, Any]) -> float | None:
    total, free = replica.get("num_blocks"), replica.get("num_free_blocks")
    return 100.0 * (1 - free / total) if total and free is not None else None


def _replica_lines(
    run: Mapping[str, Any], read: Callable[[Mapping[str, Any]], float | None]
) -> dict[int, tuple[list[float], list[float]]]:
    """Return the times [s] and values of each replica that has values."""
    found: dict[int, tuple[list[float], list[float]]] = {}
    for sample in run["monitor"]:
        for replica in sample["replicas"]:
            if (value := read(replica)) is not None:
                times_s, values = found.setdefault(replica["id"], ([], []))
                times_s.append(sample["time_s"])
                values.append(value)
    return found
