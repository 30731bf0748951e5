"""Plot style: the units, colours, axes and files of every figure."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import matplotlib.style
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter
from numpy.typing import NDArray

PNG_DPI = 150
WIDTH_IN = 9.0  # 864 px as SVG, the width that a README page shows without scaling
NUM_CDF_POINTS = 501  # more are not visible and would make the SVG megabytes large
LOG_RATIO = 50.0

# Neighbouring colours differ in lightness by 20 of 100 or more, so they stay distinct in a grey
# print. Markers or dashes distinguish the rest. The three lengths have no common factor larger than
# 1, so a combination repeats only after 30 series or more.
COLOURS = ("#10203f", "#d9572b", "#5f3a8f", "#62b5e0", "#23714a", "#dcb63a")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
DASHES: tuple[Any, ...] = (
    "-",
    (0, (5, 1.8)),
    (0, (1.2, 1.2)),
    (0, (7, 1.6, 1.2, 1.6)),
    (0, (3, 1.2, 1, 1.2, 1, 1.2)),
)
GUIDE_COLOUR = "#6b6b6b"

Curve = tuple[NDArray[np.float64], NDArray[np.float64]]  # x and y

_STYLE = {
    "font.size": 10,
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
    "axes.labelsize": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.grid": True,
    "grid.color": "#e3e3e3",
    "grid.linewidth": 0.7,
    "lines.linewidth": 1.7,
    "lines.markersize": 6.5,
    "legend.frameon": False,
    "xtick.labelsize": 9,
    "ytick.labelsize": 9,
    "text.parse_math": False,  # show a "$" in a name as it is
    "svg.fonttype": "none",
    "svg.hashsalt": "serve",  # equal figures give equal files
}


@dataclass(frozen=True, slots=True)
class Metric:
    """A latency: its key in a run file, its name and its unit in figures."""

    key: str
    name: str
    unit: str
    per_second: float  # units in a second

    @property
    def label(self) -> str:
        return f"{self.name} [{self.unit}]"

    def text(self, seconds: float) -> str:
        """Format a value with its unit."""
        return f"{seconds * self.per_second:.4g} {self.unit}"


TTFT = Metric("ttft_s", "TTFT", "s", 1.0)
TPOT = Metric("tpot_s", "TPOT", "ms", 1000.0)
ITL = Metric("itl_s", "ITL", "ms", 1000.0)
E2E = Metric("e2e_s", "E2E latency", "s", 1.0)
QUEUEING = Metric("queueing_s", "queueing time", "s", 1.0)


def styled() -> AbstractContextManager[None]:
    """Return a context in which figures are made and saved, free of the user's matplotlibrc."""
    return matplotlib.style.context(["default", _STYLE])


def points_style(index: int) -> dict[str, Any]:
    """Return the style of a line through measured points, for the series with this index."""
    return {
        "color": COLOURS[index % len(COLOURS)],
        "marker": MARKERS[index % len(MARKERS)],
        "markeredgecolor": "white",
        "markeredgewidth": 0.7,
        "clip_on": False,
    }


def reference_style(index: int) -> dict[str, Any]:
    """Return the style of a line through points that were measured elsewhere."""
    return {
        "color": "0.45",
        "linestyle": DASHES[(index + 1) % len(DASHES)],
        "marker": MARKERS[index % len(MARKERS)],
        "markerfacecolor": "white",
        "clip_on": False,
    }


def curve_style(index: int) -> dict[str, Any]:
    """Return the style of a curve without points, for the series with this index."""
    return {
        "color": COLOURS[index % len(COLOURS)],
        "linestyle": DASHES[index % len(DASHES)],
    }


def new_figure(title: str, height_in: float) -> Figure:
    """Make an empty figure as wide as a page."""
    figure = Figure(figsize=(WIDTH_IN, height_in), layout="constrained")
    text = textwrap.fill(title, 100)
    figure.suptitle(text, x=0.01, horizontalalignment="left", fontsize=11, fontweight="bold")
    return figure


def add_legend(figure: Figure, names: Sequence[str], styles: Sequence[dict[str, Any]]) -> None:
    """Add one legend below all panels, in as many columns as the longest name allows."""
    lines = [Line2D([], [], **style) for style in styles]
    longest = max(map(len, names))
    num_columns = max(1, min(len(names), 100 // (longest + 6)))
    figure.legend(
        lines, list(names), loc="outside lower center", ncols=num_columns, handlelength=3.2
    )


def save(figure: Figure, folder: Path, stem: str) -> list[Path]:
    """Write the figure as PNG and SVG. Raises ``OSError`` if the folder cannot be written."""
    folder.mkdir(parents=True, exist_ok=True)
    png, svg = folder / f"{stem}.png", folder / f"{stem}.svg"
    figure.savefig(png, dpi=PNG_DPI)
    figure.savefig(svg, metadata={"Date": None})
    return [png, svg]


def needs_log(values: Iterable[float]) -> bool:
    """Return whether the largest is more than ``LOG_RATIO`` times the smallest, zeros left out."""
    positive = [value for value in values if value > 0]
    return bool(positive) and max(positive) / min(positive) > LOG_RATIO


def fit_axis(axes: Axes, which: Literal["x", "y"], values: Sequence[float]) -> None:
    """Scale an axis linearly from zero, or logarithmically where ``needs_log`` says so."""
    axis = axes.xaxis if which == "x" else axes.yaxis
    positive = [value for value in values if value > 0]
    if needs_log(values):
        low, high = min(positive), max(positive)
        axes.set(**{f"{which}scale": "log"})
        axis.set_major_locator(LogLocator(subs=(1, 2, 5) if high / low < 400 else (1,)))
        axis.set_minor_formatter(NullFormatter())
        axes.set(**{f"{which}lim": (low / 1.15, high * 1.15)})
    else:
        axis.set_major_locator(MaxNLocator(nbins=6, steps=[1, 2, 2.5, 5, 10]))
        axes.set(**{f"{which}lim": (0, 1.05 * max(positive, default=1.0))})
    axis.set_major_formatter(FuncFormatter(_plain))


def fit_percent(axes: Axes, ticks: Sequence[int] = (0, 20, 40, 60, 80, 100)) -> None:
    """Scale the y axis from 0 to 100 %, with room for a marker at either end."""
    axes.set(ylim=(-2, 102), yticks=list(ticks))


def cdf_points(values: Iterable[float | None]) -> Curve:
    """Return the sorted values and the share [%] of values not larger; None is left out.

    More than ``NUM_CDF_POINTS`` values are reduced to quantiles, the smallest and the largest among
    them.
    """
    kept = np.sort(np.fromiter((v for v in values if v is not None), dtype=np.float64))
    if kept.size > NUM_CDF_POINTS:
        ranks = np.linspace(0, kept.size - 1, NUM_CDF_POINTS).round().astype(np.int64)
    else:
        ranks = np.arange(kept.size)
    return kept[ranks], 100.0 * (ranks + 1) / max(kept.size, 1)


def draw_cdfs(
    axes: Axes,
    metric: Metric,
    curves: Sequence[Curve],
    objective_s: float | None,
) -> None:
    """Draw CDFs in one panel. A curve without points still takes its style from the order."""
    spread: list[float] = []
    for index, (values, shares) in enumerate(curves):
        axes.plot(values, shares, drawstyle="steps-post", **curve_style(index))
        if (positive := values[values > 0]).size:
            spread += [float(np.quantile(positive, 0.01)), float(positive[-1])]
    if objective_s is not None:
        objective = objective_s * metric.per_second
        draw_guide(axes, "x", objective, f"objective {metric.text(objective_s)}")
        spread.append(objective)
    fit_axis(axes, "x", spread)
    fit_percent(axes, (0, 25, 50, 75, 90, 100))
    axes.set(xlabel=metric.label)


def draw_guide(axes: Axes, which: Literal["x", "y"], value: float, text: str = "") -> None:
    """Draw a thin line across the panel at ``value``, with its text beside it."""
    line: dict[str, Any] = {
        "color": GUIDE_COLOUR,
        "linewidth": 1.0,
        "linestyle": (0, (4, 3)),
        "zorder": 1.5,
    }
    if which == "y":
        axes.axhline(value, **line)
        axes.annotate(
            text,
            (1.01, value),
            xycoords=axes.get_yaxis_transform(),
            color=GUIDE_COLOUR,
            fontsize=8,
            verticalalignment="center",
        )
        return
    axes.axvline(value, **line)
    axes.annotate(
        text,
        (value, 0.03),
        xycoords=axes.get_xaxis_transform(),
        xytext=(-2, 0),
        textcoords="offset points",
        color=GUIDE_COLOUR,
        fontsize=8,
        rotation=90,
        horizontalalignment="right",
        verticalalignment="bottom",
    )


def _plain(value: float, _position: int | None = None) -> str:
    return f"{value:.10g}" if abs(value) < 1e6 else f"{value:.4g}"
