"""The figures: which of them are drawn for a measurement, and the texts in them."""

from __future__ import annotations

import math
from itertools import combinations, pairwise
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from bench.load.plot_style import COLOURS, DASHES, MARKERS
from bench.load.plots import Series, attainment_at_scale, draw_run, draw_sweep, runs_to_compare
from bench.load.record import Record
from bench.load.report import Objectives, run_file
from bench.load.workload import WorkloadOptions

OBJECTIVES = Objectives(ttft_s=1.0, tpot_s=0.05)
PNG = b"\x89PNG\r\n\x1a\n"


def make_run(rate: float, *, staged: bool = True, sampled: bool = True) -> dict[str, Any]:
    """Make a run of twenty requests whose latencies grow with the rate."""
    records = []
    for index in range(20):
        at = index / rate
        first = at + 0.1 * rate + index / 100
        timeline: dict[str, float | None] | None = None
        if staged:
            timeline = {"arrived_s": at, "prefill_started_s": at + rate / 50}
        records.append(
            Record(
                index=index,
                scheduled_s=at,
                sent_s=at,
                end_s=first + 1,
                num_prompt_tokens=5,
                max_tokens=11,
                num_output_tokens=11,
                token_times_s=[first + i / 10 for i in range(11)],
                token_counts=[1] * 11,
                timeline=timeline,
            )
        )
    replica = {"id": 0, "role": "mixed", "num_waiting": 1, "num_running": 2}
    sample = {"time_s": 0.5, "replicas": [replica | {"num_blocks": 10, "num_free_blocks": 4}]}
    options = WorkloadOptions(input_len=5, output_len=11, rate=rate)
    target = {"base_urls": ["http://x"], "model": "m"}
    head = {"target": target, "workload": options.describe() | {"num_requests": 20}}
    return run_file(head, records, 0.0, OBJECTIVES, [sample] * 3 if sampled else [])


def texts(path: Path) -> str:
    """Return all text of an SVG. Raises ``ParseError`` if it is not well-formed."""
    root = ElementTree.parse(path).getroot()
    return "\n".join("".join(node.itertext()) for node in root.iter() if node.tag.endswith("text"))


def assert_drawn(paths: list[Path], stems: set[str]) -> None:
    assert {path.stem for path in paths} == stems
    assert {path.suffix for path in paths} == {".png", ".svg"}
    for path in paths:
        content = path.read_bytes()
        assert len(content) > 5000
        assert path.suffix == ".svg" or content.startswith(PNG)


def test_a_run_has_its_latencies_and_its_timeline(tmp_path: Path) -> None:
    assert_drawn(draw_run(make_run(4.0), tmp_path), {"latency_cdf", "timeline"})
    found = texts(tmp_path / "latency_cdf.svg")
    assert all(name in found for name in ("TTFT [s]", "TPOT [ms]", "ITL [ms]", "E2E latency [s]"))
    assert "KV use [%]" in texts(tmp_path / "timeline.svg")


def test_without_samples_there_is_no_timeline(tmp_path: Path) -> None:
    assert_drawn(draw_run(make_run(4.0, sampled=False), tmp_path), {"latency_cdf"})


def test_a_sweep_has_the_papers_figures(tmp_path: Path) -> None:
    series = [
        Series("colocated", (make_run(2), make_run(4)), 2),
        Series("1P+1D", (make_run(2), make_run(4), make_run(8)), 2),
    ]
    stems = {"attainment", "latency", "queueing", "cdf", "slo_scale"}
    assert_drawn(draw_sweep("both ways", series, [0.9, 0.99], tmp_path), stems)
    found = texts(tmp_path / "attainment.svg")
    assert "both ways" in found
    assert "colocated" in found
    assert "1P+1D" in found
    assert "offered rate per GPU [req/s/GPU]" in found
    assert "90 %" in found
    assert "99 %" in found


def test_points_measured_elsewhere_are_named_beside_ours(tmp_path: Path) -> None:
    series = [Series("1P+1D", (make_run(2), make_run(4)), 2)]
    peers = {"a peer (another day)": [(1.0, 1.0), (2.0, 0.8)]}
    drawn = draw_sweep("both", series, [0.9], tmp_path / "with", peers)
    draw_sweep("both", series, [0.9], tmp_path / "without")
    assert "a peer (another day)" in texts(tmp_path / "with" / "attainment.svg")
    for path in drawn:
        same = path.read_bytes() == (tmp_path / "without" / path.name).read_bytes()
        assert same == (path.stem != "attainment"), path.name


def test_queueing_needs_the_servers_timelines(tmp_path: Path) -> None:
    series = [Series("other", (make_run(2, staged=False),), 1)]
    drawn = draw_sweep("other", series, [0.9], tmp_path)
    assert "queueing" not in {path.stem for path in drawn}


def test_equal_runs_give_equal_files(tmp_path: Path) -> None:
    one = {p.name: p.read_bytes() for p in draw_run(make_run(3.0), tmp_path / "a")}
    two = {p.name: p.read_bytes() for p in draw_run(make_run(3.0), tmp_path / "b")}
    assert one == two


def test_nothing_to_draw_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no series"):
        draw_sweep("empty", [], [0.9], tmp_path)
    with pytest.raises(ValueError, match="'empty one'"):
        draw_sweep("empty", [Series("empty one", (), 1)], [0.9], tmp_path)


def test_configurations_are_compared_at_the_highest_rate_that_all_have() -> None:
    series = [
        Series("a", (make_run(2), make_run(4), make_run(6)), 2),
        Series("b", (make_run(2), make_run(4), make_run(8)), 2),
    ]
    assert [rate for rate, _ in runs_to_compare(series)] == [2.0, 2.0]
    apart = [Series("a", (make_run(2),), 2), Series("b", (make_run(3),), 2)]
    assert [rate for rate, _ in runs_to_compare(apart)] == [1.0, 1.5]


ROWS: list[dict[str, Any]] = [
    {"error": None, "ttft_s": 0.5, "tpot_s": 0.02},
    {"error": None, "ttft_s": 1.5, "tpot_s": 0.02},
    {"error": None, "ttft_s": 0.5, "tpot_s": None},  # one token
    {"error": "503", "ttft_s": None, "tpot_s": None},
]


@pytest.mark.parametrize(
    ("ttft_s", "tpot_s", "scale", "share"),
    [
        (1.0, 0.02, 1.0, 0.5),
        (1.0, 0.02, 0.9, 0.25),
        (1.0, 0.02, 1.5, 0.75),
        (1.0, 0.02, 0.4, 0.0),
        (1.0, None, 1.0, 0.5),
        (None, 0.01, 1.0, 0.25),
        (None, None, 1.0, 0.75),
    ],
)
def test_attainment_at_scaled_objectives(
    ttft_s: float | None, tpot_s: float | None, scale: float, share: float
) -> None:
    assert attainment_at_scale(ROWS, ttft_s, tpot_s, scale) == share


def test_neighbours_are_told_apart_without_colour() -> None:
    def lightness(colour: str) -> float:
        red, green, blue = (int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5))
        linear = (math.pow(channel, 2.2) for channel in (red, green, blue))
        return sum(w * c for w, c in zip((0.2126, 0.7152, 0.0722), linear, strict=True))

    assert all(abs(lightness(a) - lightness(b)) > 0.04 for a, b in pairwise(COLOURS))
    assert all(a != b for a, b in combinations(MARKERS, 2))
    assert all(a != b for a, b in combinations(DASHES, 2))
