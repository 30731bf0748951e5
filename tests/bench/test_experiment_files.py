"""Experiment files: their paths and errors, the dry run, and those that are shipped."""

from __future__ import annotations

from pathlib import Path

import pytest

from bench.load.workload import make_plan
from bench.sweep.configuration import configurations
from bench.sweep.experiment import (
    Experiment,
    ExperimentError,
    Splits,
    read_experiment,
)
from bench.sweep.run import main
from tests.support.paths import ROOT

EXPERIMENTS = ROOT / "bench" / "experiments"


def write(folder: Path, text: str) -> Path:
    path = folder / "experiment.yaml"
    path.write_text(text)
    return path


SMALL = """
name: small
objectives: {ttft_s: 1}
rates: {values: [2, 1]}
servers: [{splits: all}]
"""


def test_paths_are_found_beside_the_file_then_here(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    beside, here = tmp_path / "beside", tmp_path / "here"
    for folder in (beside, here):
        (folder / "model").mkdir(parents=True)
    (here / "trace.jsonl").touch()
    monkeypatch.chdir(here)
    path = write(beside, SMALL + "model: model\nworkload: {trace: trace.jsonl}\n")
    found = read_experiment(path)
    assert found.model == str(beside / "model")
    assert found.workload.trace == str(here / "trace.jsonl")
    given = read_experiment(path, 3, Path("model"), Path("other.jsonl"))
    assert (given.gpus, given.model) == (3, str(here / "model"))
    assert given.workload.trace == str(here / "other.jsonl")
    assert read_experiment(write(beside, SMALL)).model is None


@pytest.mark.parametrize(
    "text", ["name: [", "- a\n", "", SMALL + "name: twice\n", SMALL + "goals: no\n"]
)
def test_malformed_files_are_named(tmp_path: Path, text: str) -> None:
    path = write(tmp_path, text)
    with pytest.raises(ExperimentError, match=str(path)) as failed:
        read_experiment(path)
    assert "\n" not in str(failed.value)


@pytest.mark.parametrize(
    ("text", "options", "reason"),
    [
        (SMALL + "model: nowhere\n", [], "nowhere"),
        (SMALL + "workload: {workload: mooncake, trace: lost.jsonl}\n", [], "lost.jsonl"),
        (SMALL + "workload: {input_len: 4}\n", [], "output length"),
        (SMALL, ["--only", "5P+1D"], "5P+1D"),
        (SMALL, ["--gpus", "0"], "--gpus 0"),
        (SMALL, ["--trace", "x"], "trace"),
    ],
)
def test_a_dry_run_finds_what_is_missing(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    text: str,
    options: list[str],
    reason: str,
) -> None:
    with pytest.raises(SystemExit) as ended:
        main([str(write(tmp_path, text)), "--dry-run", *options])
    assert ended.value.code == 2
    assert reason in capsys.readouterr().err


def _shipped() -> list[Path]:
    return sorted(EXPERIMENTS.glob("*.yaml"))


def test_what_is_shipped() -> None:
    names = {path.stem for path in _shipped()}
    assert names >= {"smoke", "longbench", "mooncake", "sharegpt", "fixed8000"}


@pytest.mark.parametrize("path", _shipped(), ids=lambda path: path.stem)
def test_shipped_experiments_dry_run(
    path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Every command is printed, our options are known, and each load can be planned."""
    options = []
    if path.stem == "mooncake":
        options = ["--trace", str(_trace(tmp_path, 1000))]
    assert main([str(path), "--dry-run", "--gpus", "4", *options]) == 0
    lines = capsys.readouterr().out.splitlines()
    experiment = read_experiment(path, gpus=4)
    found = configurations(experiment)
    assert sum("serve.launch" in line for line in lines) == len(found)
    num_loads = sum("bench.serve" in line for line in lines)
    assert num_loads == len(found) * len(experiment.rates.values)
    if any(entry.splits == "all" for entry in experiment.servers if isinstance(entry, Splits)):
        assert [one.name for one in found] == ["colocated", "1P+3D", "2P+2D", "3P+1D"]


@pytest.mark.parametrize("path", _shipped(), ids=lambda path: path.stem)
def test_shipped_requests_fit_the_server(path: Path, tmp_path: Path) -> None:
    trace = _trace(tmp_path, 1000) if path.stem == "mooncake" else None
    experiment = read_experiment(path, trace=trace)
    limit = experiment.serve_options["max-model-len"]
    assert isinstance(limit, int)
    assert max(_total_lengths(experiment)) <= limit


def _total_lengths(experiment: Experiment) -> list[int]:
    plan = make_plan(experiment.workload.plan_options(experiment.rates.values[0]))
    return [(request.input_len or 0) + request.max_tokens for request in plan]


def _trace(folder: Path, num_requests: int) -> Path:
    """Write a Mooncake trace; some of its requests are longer than any limit."""
    path = folder / "trace.jsonl"
    with path.open("w") as file:
        for index in range(num_requests):
            length = 512 * (1 + index % 40)
            ids = list(range(length // 512))
            file.write(
                f'{{"timestamp": {index * 250}, "input_length": {length}, '
                f'"output_length": {1 + index % 500}, "hash_ids": {ids}}}\n'
            )
    return path
