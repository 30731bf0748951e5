"""Figure: memory, blocks, file descriptors and requests of a soak over time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from io import BytesIO
from itertools import pairwise
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator
from PIL import Image

from bench.load.plot_style import add_legend, curve_style, new_figure, styled
from bench.soak.monitor import Probe, RankSample, Sample
from bench.soak.report import Report

_DPI = 100
_NUM_COLOURS = 32
_MIB = 2**20
_FLOOD_COLOUR = "#d9572b"

Line = tuple[list[float], list[float]]  # times [s] and values


def draw(report: Report, path: Path) -> None:
    """Write the figure as PNG. Floods are shaded."""
    samples = report.samples
    path.parent.mkdir(parents=True, exist_ok=True)
    ranks = sorted({one.rank for sample in samples for one in sample.ranks})
    roles = {one["id"]: one["role"] for sample in samples for one in sample.replicas}
    with styled():
        figure = new_figure(report.title(), 9.0)
        columns = figure.subplots(5, 1, sharex=True)
        memory, fds, blocks, rate, probe = columns
        for index, rank in enumerate(ranks):
            memory.plot(*_of_rank(samples, rank, _rss_mib), **curve_style(index))
            fds.plot(*_of_rank(samples, rank, lambda one: one.num_fds), **curve_style(index))
        for index, replica in enumerate(sorted(roles)):
            blocks.plot(*_free_blocks(samples, replica), **curve_style(index))
        rate.plot(*_rates(samples), **curve_style(0))
        probe.plot(*_probes(report.probes), **curve_style(0))
        _label(memory, "resident memory of each rank", "MiB")
        _label(fds, "open file descriptors of each rank", "count")
        _label(blocks, "free KV blocks of each replica", "blocks")
        _label(rate, "requests answered", "requests/s")
        _label(probe, "latency of a small request", "s")
        for axes in columns:
            for phase in report.phases:
                axes.axvspan(
                    phase.start_s, phase.end_s, color=_FLOOD_COLOUR, alpha=0.15, linewidth=0
                )
        probe.set(
            xlabel="time since the start of the run [s]; floods are shaded",
            xlim=(0, samples[-1].time_s),
        )
        names = [f"rank {rank}, replica {roles.get(rank, '')}".rstrip() for rank in ranks]
        if names:
            add_legend(figure, names, [curve_style(index) for index in range(len(names))])
        drawn = BytesIO()
        figure.savefig(drawn, dpi=_DPI)
    # A palette, because the file is a third of the size and lies in the repository.
    Image.open(drawn).convert("RGB").quantize(_NUM_COLOURS).save(path, optimize=True)


def _label(axes: Axes, title: str, unit: str) -> None:
    axes.set(title=title, ylabel=unit, ylim=(0, None))
    axes.yaxis.set_major_locator(MaxNLocator(nbins=4))


def _rss_mib(one: RankSample) -> float:
    return one.rss_bytes / _MIB


def _of_rank(samples: Sequence[Sample], rank: int, read: Callable[[RankSample], float]) -> Line:
    found = [(s.time_s, read(one)) for s in samples for one in s.ranks if one.rank == rank]
    return [time_s for time_s, _ in found], [value for _, value in found]


def _free_blocks(samples: Sequence[Sample], replica: int) -> Line:
    found = [
        (s.time_s, one["num_free_blocks"]) for s in samples for one in s.replicas
        if one["id"] == replica
    ]  # fmt: skip
    return [time_s for time_s, _ in found], [value for _, value in found]


def _rates(samples: Sequence[Sample]) -> Line:
    times_s, values = [], []
    for before, after in pairwise(samples):
        times_s.append(after.time_s)
        values.append((after.num_done - before.num_done) / (after.time_s - before.time_s))
    return times_s, values


def _probes(probes: Sequence[Probe]) -> Line:
    found = [(p.time_s, p.latency_s) for p in probes if p.latency_s is not None]
    return [time_s for time_s, _ in found], [value for _, value in found]
