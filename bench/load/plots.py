"""Plots: draws one run, and several servers over rates as in the papers."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from bench.load.plot_run import latency_cdf, rate_of, run_cdf, timeline
from bench.load.plot_style import (
    E2E,
    QUEUEING,
    TPOT,
    TTFT,
    Metric,
    add_legend,
    curve_style,
    draw_cdfs,
    draw_guide,
    fit_axis,
    fit_percent,
    new_figure,
    points_style,
    reference_style,
    save,
    styled,
)

RATE_LABEL = "offered rate per GPU [req/s/GPU]"
SAME_RATE = 0.01  # relative tolerance, because rates of random arrivals are never quite equal
SCALES = 2.0 ** np.linspace(-2, 2, 65)

Run = dict[str, Any]
# By name: rate per GPU and joint SLO attainment of points that were measured elsewhere.
References = Mapping[str, Sequence[tuple[float, float]]]


@dataclass(frozen=True, slots=True)
class Series:
    """The runs of one server configuration, by rising rate."""

    name: str
    runs: tuple[Run, ...]
    num_gpus: int

    def measured(self) -> list[tuple[float, Run]]:
        """Return the runs that have a rate, each with its rate per GPU [req/s/GPU]."""
        rates = [(rate_of(run), run) for run in self.runs]
        return [(rate / self.num_gpus, run) for rate, run in rates if rate is not None]


def attainment_at_scale(
    requests: Iterable[Mapping[str, Any]],
    ttft_s: float | None,
    tpot_s: float | None,
    scale: float,
) -> float:
    """Return the share of ``requests`` within both objectives [s] times ``scale``.

    ``requests`` are rows of a run file. An objective of None is always met. A request that failed
    or got no token meets none. An answer of one token has no TPOT and meets that objective. Raises
    ``ValueError`` without requests.
    """

    def within(value: float | None, objective: float | None) -> bool:
        return value is None or objective is None or value <= objective * scale

    met = [
        row["error"] is None
        and row["ttft_s"] is not None
        and within(row["ttft_s"], ttft_s)
        and within(row["tpot_s"], tpot_s)
        for row in requests
    ]
    if not met:
        raise ValueError("attainment of no requests")
    return sum(met) / len(met)


def draw_run(run: Run, folder: Path) -> list[Path]:
    """Draw ``latency_cdf`` and ``timeline`` of a run file; return the files, PNG and SVG.

    A panel or figure without measurements is left out. Raises ``OSError`` if the folder cannot be
    written.
    """
    with styled():
        figures = {"latency_cdf": latency_cdf(run), "timeline": timeline(run)}
        return _save_all(figures, folder)


def draw_sweep(
    title: str,
    series: Sequence[Series],
    goals: Sequence[float],
    folder: Path,
    references: References | None = None,
) -> list[Path]:
    """Draw several server configurations over rates; return the files, PNG and SVG.

    The figures are those of DistServe (OSDI'24), section 6.2: ``attainment``, ``latency``,
    ``queueing``, ``cdf`` and ``slo_scale``. ``goals`` are shares of SLO attainment such as 0.9.
    ``references`` are drawn beside the joint attainment. Figures without measurements are left out.
    Raises ``ValueError`` if there is no series or one has no run with a rate, ``OSError`` if the
    folder cannot be written.
    """
    if not series:
        raise ValueError(f"nothing to draw for {title!r}: no series")
    for one in series:
        if not one.measured():
            raise ValueError(f"nothing to draw for series {one.name!r}: no run with a rate")
    with styled():
        figures = {
            "attainment": _attainment(title, series, goals, references or {}),
            "latency": _latency(title, series),
            "queueing": _queueing(title, series),
            "cdf": _cdf(title, series),
            "slo_scale": _slo_scale(title, series, goals),
        }
        return _save_all(figures, folder)


def _save_all(figures: Mapping[str, Figure | None], folder: Path) -> list[Path]:
    drawn = [(stem, figure) for stem, figure in figures.items() if figure is not None]
    return [path for stem, figure in drawn for path in save(figure, folder, stem)]


def runs_to_compare(series: Sequence[Series]) -> list[tuple[float, Run]]:
    """Choose one run of each series, with its rate per GPU [req/s/GPU].

    It is the run at the highest rate that all series have; without such a rate, each series' run at
    its own highest rate.
    """
    for common, _ in sorted(series[0].measured(), key=_rate, reverse=True):
        nearest = [min(one.measured(), key=lambda at: abs(at[0] - common)) for one in series]
        if all(math.isclose(rate, common, rel_tol=SAME_RATE) for rate, _ in nearest):
            return nearest
    return [max(one.measured(), key=_rate) for one in series]


def _rate(measured: tuple[float, Run]) -> float:
    return measured[0]


def _objectives(runs: Iterable[Run], metric: Metric) -> set[float]:
    """Return the distinct objectives [s] of the runs for this metric."""
    return {run["objectives"].get(metric.key) for run in runs} - {None}


def _all_runs(series: Sequence[Series]) -> list[Run]:
    return [run for one in series for _, run in one.measured()]


def _draw_against_rate(
    axes: Axes, series: Sequence[Series], value: Callable[[Run], float | None]
) -> list[float]:
    """Draw one line per series through the runs that have the value; return all values."""
    drawn: list[float] = []
    for index, one in enumerate(series):
        points = [(rate, value(run)) for rate, run in sorted(one.measured(), key=_rate)]
        known = [(rate, found) for rate, found in points if found is not None]
        axes.plot([x for x, _ in known], [y for _, y in known], **points_style(index))
        drawn += [y for _, y in known]
    fit_axis(axes, "x", [rate for one in series for rate, _ in one.measured()] + [0.0])
    return drawn


def _attainment(
    title: str, series: Sequence[Series], goals: Sequence[float], references: References
) -> Figure | None:
    runs = [run for run in _all_runs(series) if run["summary"]["attainment"] is not None]
    if not runs:
        return None
    alone = [metric for metric in (TTFT, TPOT) if _objectives(runs, metric)]
    figure = new_figure(f"{title}: SLO attainment", 4.6)
    grid = figure.add_gridspec(len(alone), 2, width_ratios=(1.8, 1))
    panels = [(figure.add_subplot(grid[:, 0]), "joint", _objectives_text(runs))]
    for row, metric in enumerate(alone):
        text = f"{metric.name} only"
        panels.append((figure.add_subplot(grid[row, 1]), metric.key.removesuffix("_s"), text))
    for axes, kind, text in panels:
        _draw_against_rate(axes, series, partial(_attainment_percent, kind=kind))
        fit_percent(axes)
        for goal in goals:
            draw_guide(axes, "y", 100 * goal, f"{100 * goal:.4g} %" if kind == "joint" else "")
        axes.set(title=text, xlabel=RATE_LABEL)
    panels[0][0].set(ylabel="SLO attainment [%]")
    for index, points in enumerate(references.values()):
        joint = [100 * share for _, share in points]
        panels[0][0].plot([rate for rate, _ in points], joint, **reference_style(index))
    names = [*(one.name for one in series), *references]
    styles = [points_style(index) for index in range(len(series))]
    add_legend(figure, names, styles + [reference_style(i) for i in range(len(references))])
    return figure


def _attainment_percent(run: Run, kind: str) -> float | None:
    found = run["summary"]["attainment"]
    return 100.0 * found[kind] if found is not None else None


def _objectives_text(runs: Iterable[Run]) -> str:
    """Return text such as "TTFT <= 1 s and TPOT <= 20 ms", without numbers where runs differ."""
    found = {metric: _objectives(runs, metric) for metric in (TTFT, TPOT)}
    return " and ".join(
        f"{metric.name} \u2264 {metric.text(*values)}" if len(values) == 1 else metric.name
        for metric, values in found.items()
        if values
    )


def _latency(title: str, series: Sequence[Series]) -> Figure:
    figure = new_figure(f"{title}: latency", 7.6)
    panels = figure.subplots(3, 2, sharex=True)
    for row, metric in zip(panels, (TTFT, TPOT, E2E), strict=True):
        for axes, (stat, name) in zip(row, (("mean", "mean"), ("p90", "P90")), strict=True):
            values = _draw_against_rate(axes, series, partial(_stat, metric=metric, stat=stat))
            fit_axis(axes, "y", values)
            axes.set(title=f"{name} {metric.name}", ylabel=metric.label)
    for axes in panels[-1]:
        axes.set(xlabel=RATE_LABEL)
    _add_series_legend(figure, series, points_style)
    return figure


def _stat(run: Run, metric: Metric, stat: str) -> float | None:
    """Return a figure of the run's summary in the metric's own unit."""
    found = run["summary"][metric.key]
    return found[stat] * metric.per_second if found is not None else None


def _queueing(title: str, series: Sequence[Series]) -> Figure | None:
    figure = new_figure(f"{title}: P90 queueing time", 4.2)
    axes = figure.subplots()
    values = _draw_against_rate(axes, series, lambda run: _stat(run, QUEUEING, "p90"))
    if not values:
        return None
    fit_axis(axes, "y", values)
    axes.set(xlabel=RATE_LABEL, ylabel=f"P90 {QUEUEING.label}")
    _add_series_legend(figure, series, points_style)
    return figure


def _cdf(title: str, series: Sequence[Series]) -> Figure:
    chosen = runs_to_compare(series)
    figure = new_figure(f"{title}: latency of all requests", 4.0)
    for axes, metric in zip(figure.subplots(1, 3, sharey=True), (TTFT, TPOT, E2E), strict=True):
        objectives = _objectives((run for _, run in chosen), metric)
        curves = [run_cdf(run, metric) for _, run in chosen]
        draw_cdfs(axes, metric, curves, objectives.pop() if len(objectives) == 1 else None)
    figure.axes[0].set(ylabel="share of requests [%]")
    _add_series_legend(figure, series, curve_style, [rate for rate, _ in chosen])
    return figure


def _slo_scale(title: str, series: Sequence[Series], goals: Sequence[float]) -> Figure | None:
    chosen = runs_to_compare(series)
    if not _objectives_text(run for _, run in chosen):
        return None
    figure = new_figure(f"{title}: SLO attainment with tighter and looser objectives", 4.4)
    axes = figure.subplots()
    for index, (_, run) in enumerate(chosen):
        ttft_s, tpot_s = run["objectives"]["ttft_s"], run["objectives"]["tpot_s"]
        if run["requests"] and (ttft_s is not None or tpot_s is not None):
            shares = [attainment_at_scale(run["requests"], ttft_s, tpot_s, at) for at in SCALES]
            axes.plot(SCALES, 100 * np.asarray(shares), **curve_style(index))
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_locator(FixedLocator([0.25, 0.5, 1, 2, 4]))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.xaxis.set_minor_locator(NullLocator())
    fit_percent(axes)
    for goal in goals:
        draw_guide(axes, "y", 100 * goal, f"{100 * goal:.4g} %")
    text = _objectives_text([run for _, run in chosen])
    axes.set(xlabel=f"factor on the objectives (1: {text})", ylabel="SLO attainment [%]")
    axes.set(xlim=(SCALES[0], SCALES[-1]))
    _add_series_legend(figure, series, curve_style, [rate for rate, _ in chosen])
    return figure


def _add_series_legend(
    figure: Figure,
    series: Sequence[Series],
    style: Callable[[int], dict[str, Any]],
    rates: Sequence[float] = (),
) -> None:
    names = [one.name for one in series]
    if rates:
        names = [f"{name}, {rate:.3g} req/s/GPU" for name, rate in zip(names, rates, strict=True)]
    add_legend(figure, names, [style(index) for index in range(len(series))])
