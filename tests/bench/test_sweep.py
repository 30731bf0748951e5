"""Whole sweeps with real processes: measuring, resuming, reporting, and ending all processes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest

from bench.sweep.configuration import Configuration, Launch
from bench.sweep.run import INTERRUPTED, main
from bench.sweep.server_job import ServerJob
from tests.support.fake_openai import DIED
from tests.support.paths import ROOT

FAKE = f"{{python}} {ROOT / 'tests' / 'support' / 'fake_openai.py'} --port {{port}}"
PNG = b"\x89PNG"


def write_experiment(folder: Path, servers: list[dict[str, Any]], **changes: Any) -> Path:
    """Write an experiment of six requests at each of two rates, with objectives easy to meet."""
    content = {
        "name": "fakes",
        "objectives": {"ttft_s": 60, "tpot_s": 60},
        "workload": {"input_len": 8, "output_len": 4, "num_requests": 6, "num_warmups": 0},
        "rates": {"values": [40, 20], "bisect": 1},
        "servers": servers,
    }
    path = folder / "experiment.yaml"
    path.write_text(json.dumps(content | changes))  # JSON is YAML
    return path


def points(folder: Path) -> dict[str, bytes]:
    """Read every file under ``points``."""
    top = folder / "points"
    return {str(path.relative_to(top)): path.read_bytes() for path in top.glob("*/*")}


def summary(folder: Path) -> dict[str, Any]:
    """Return the configurations of ``summary.json`` by name."""
    found = json.loads((folder / "summary.json").read_bytes())
    return {one["name"]: one for one in found["configurations"]}


def answered_rps(folder: Path, configuration: str) -> float:
    """Return the most requests that a configuration answered per second, at any rate."""
    paths = (folder / "points" / configuration).glob("*.json")
    summaries = [json.loads(path.read_bytes())["summary"] for path in paths]
    return max(float(one["request_throughput_rps"]) for one in summaries)


@contextmanager
def running(command: list[str]) -> Iterator[subprocess.Popen[str]]:
    """Run a process, killed at the end; its stderr goes to its stdout."""
    with subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
        try:
            yield process
        finally:
            process.kill()


@pytest.fixture
def no_plots(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave out the plots of sweeps in this process, which take seconds."""
    monkeypatch.setattr("bench.sweep.run.draw_sweep", lambda *_: [])


def test_a_sweep_measures_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two copies take turns; a second start does nothing, a third only what is missing."""
    path = write_experiment(tmp_path, [{"name": "pair", "command": FAKE, "copies": 2}], gpus=4)
    folder = tmp_path / "out"
    command = [str(path), "--output", str(folder)]
    assert main(command) == 0
    first = points(folder)
    assert set(first) == {"pair/rate-20.json", "pair/rate-40.json"}
    run = json.loads(first["pair/rate-20.json"])
    assert run["workload"]["rate"] == 20
    assert run["objectives"] == {"ttft_s": 60, "tpot_s": 60}
    assert len(set(run["target"]["base_urls"])) == 2
    pair = summary(folder)["pair"]
    assert pair["status"] == "complete"
    assert [one["rate"] for one in pair["points"]] == [20, 40]
    rps = min(40, answered_rps(folder, "pair"))
    assert pair["goodput"]["0.9"] == {"rps": rps, "per_gpu_rps": rps / 4, "knee_found": False}
    assert f"| pair | 4 | ≥ {rps:.3g} | ≥ {rps / 4:.3g} |" in (folder / "summary.md").read_text()
    assert (folder / "plots" / "attainment.png").read_bytes().startswith(PNG)

    monkeypatch.setattr("bench.sweep.run.draw_sweep", lambda *_: [])
    logs = {log.name: log.read_bytes() for log in (folder / "servers").iterdir()}
    assert set(logs) == {"pair-0.log", "pair-1.log"}
    assert main(command) == 0
    assert points(folder) == first
    assert {log.name: log.read_bytes() for log in (folder / "servers").iterdir()} == logs

    (folder / "points" / "pair" / "rate-20.json").unlink()
    (folder / "points" / "pair" / "rate-20.json.tmp").write_text("cut off")
    assert main(command) == 0
    again = points(folder)
    assert set(again) == set(first)
    assert again["pair/rate-40.json"] == first["pair/rate-40.json"]


@pytest.mark.usefixtures("no_plots")
def test_one_server_failing_does_not_stop_the_others(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Two do not start, one dies under load, one refuses every request, one works."""
    servers = [
        {"name": "broken", "command": "{python} -c 'exit(\"no {port} today\")'"},
        {"name": "missing", "command": "/no/such/program {port}"},
        {"name": "dying", "command": f"{FAKE} --die"},
        {"name": "refusing", "command": f"{FAKE} --refuse"},
        {"name": "well", "command": FAKE},
    ]
    folder = tmp_path / "out"
    path = write_experiment(tmp_path, servers, rates={"values": [20], "bisect": 1})
    assert main([str(path), "--output", str(folder)]) == 1
    found = summary(folder)
    assert [found[one["name"]]["status"] for one in servers] == [
        "failed", "failed", "failed", "complete", "complete",
    ]  # fmt: skip
    assert "status 1" in found["broken"]["failure"]
    assert "today" in found["broken"]["failure"]
    assert str(folder / "servers" / "broken.log") in found["broken"]["failure"]
    assert "/no/such/program" in found["missing"]["failure"]
    assert f"status {DIED}" in found["dying"]["failure"]
    assert "out of luck" in found["dying"]["failure"]
    assert found["dying"]["points"] == []  # a run that saw the server die is worth nothing
    assert [one["rate"] for one in found["refusing"]["points"]] == [10, 20]
    assert found["refusing"]["goodput"]["0.9"]["rps"] is None
    assert found["refusing"]["points"][0]["num_errors"] == 6
    assert found["well"]["goodput"]["0.9"]["rps"] == min(20, answered_rps(folder, "well"))
    text = (folder / "summary.md").read_text()
    assert "| refusing | 1 | < 10 |" in text
    assert "out of luck" in text
    assert "out of luck" in capfd.readouterr().err


@pytest.mark.usefixtures("no_plots")
def test_ctrl_c_leaves_what_is_done(tmp_path: Path) -> None:
    """Interrupted in the second rate; then the same command measures what is missing."""
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    path = write_experiment(
        tmp_path, [{"name": "held", "command": f"{FAKE} --hold-after 6 {fifo}"}]
    )
    folder = tmp_path / "out"
    command = [sys.executable, "-m", "bench.sweep", str(path), "--output", str(folder)]
    with running(command) as sweep:
        server = psutil.Process(int(fifo.read_text()))  # waits for the request that is held
        children = psutil.Process(sweep.pid).children(recursive=True)
        assert server in children
        assert len(children) > 1
        sweep.send_signal(signal.SIGINT)
        output, _ = sweep.communicate()
        assert sweep.returncode == INTERRUPTED, output
    _, alive = psutil.wait_procs(children, timeout=20)
    assert not alive
    before = points(folder)
    assert set(before) == {"held/rate-20.json"}
    assert summary(folder)["held"]["status"] == "incomplete"
    assert len(summary(folder)["held"]["points"]) == 1

    fifo.unlink()
    assert main([str(path), "--output", str(folder)]) == 0
    after = points(folder)
    assert set(after) == {"held/rate-20.json", "held/rate-40.json"}
    assert after["held/rate-20.json"] == before["held/rate-20.json"]
    assert summary(folder)["held"]["status"] == "complete"


@pytest.mark.usefixtures("no_plots")
def test_a_folder_belongs_to_one_experiment(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "out"
    server = {"name": "broken", "command": "{python} -c 'exit({port})'"}
    path = write_experiment(tmp_path, [server])
    assert main([str(path), "--output", str(folder)]) == 1
    write_experiment(tmp_path, [server], rates={"values": [3]}, goals=[0.8], description="new")
    assert main([str(path), "--output", str(folder)]) == 1  # these may change
    write_experiment(tmp_path, [server], objectives={"ttft_s": 1})
    with pytest.raises(SystemExit) as ended:
        main([str(path), "--output", str(folder)])
    assert ended.value.code == 2
    assert "another objectives" in capsys.readouterr().err
    kept = json.loads((folder / "experiment.json").read_bytes())
    assert (kept["objectives"]["ttft_s"], kept["rates"]["values"]) == (60, [3])


def test_only_one_sweep_at_a_time(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    path = write_experiment(tmp_path, [{"name": "x", "command": f"{FAKE} --hold-after 0 {fifo}"}])
    command = [str(path), "--output", str(tmp_path / "out")]
    with running([sys.executable, "-m", "bench.sweep", *command]) as sweep:
        fifo.read_text()
        with pytest.raises(SystemExit) as ended:
            main(command)
        assert ended.value.code == 2
        assert "another sweep" in capsys.readouterr().err
        sweep.terminate()  # the same as Ctrl-C
        sweep.communicate()
        assert sweep.returncode == INTERRUPTED


@pytest.mark.usefixtures("no_plots")
def test_a_server_that_runs_already_is_left_alone(tmp_path: Path) -> None:
    command = tuple(FAKE.replace("{python}", sys.executable).split())
    configuration = Configuration("there", 1, (Launch(command),))
    with ServerJob(configuration, tmp_path / "servers") as job:
        entry = {"name": "there", "base_urls": list(job.base_urls), "gpus": 1}
        path = write_experiment(tmp_path, [entry], rates={"values": [20]})
        assert main([str(path), "--output", str(tmp_path / "out")]) == 0
        job.check()  # it lives
    assert set(points(tmp_path / "out")) == {"there/rate-20.json"}
    assert not (tmp_path / "out" / "servers").exists()


def test_the_shipped_smoke_experiment(tmp_path: Path) -> None:
    """Our own server, both ways, on the CPU: from the command line to the figures."""
    folder = tmp_path / "out"
    command = [sys.executable, "-m", "bench.sweep", "bench/experiments/smoke.yaml"]
    ended = subprocess.run([*command, "--output", str(folder)], cwd=ROOT, check=False)
    assert ended.returncode == 0
    found = summary(folder)
    assert list(found) == ["colocated", "1P+1D"]
    for one in found.values():
        assert one["status"] == "complete"
        assert one["num_gpus"] == 2
        assert [point["rate"] for point in one["points"]] == [2, 4]
        assert all(point["num_errors"] == 0 for point in one["points"])
        assert all(point["num_requests"] == 8 for point in one["points"])
        assert one["goodput"]["0.99"]["rps"] == min(4, answered_rps(folder, one["name"]))
    apart = json.loads((folder / "points" / "1P+1D" / "rate-4.json").read_bytes())
    assert apart["summary"]["stages"]["transfer_s"]["mean"] > 0
    assert {replica["role"] for sample in apart["monitor"] for replica in sample["replicas"]} == {
        "prefill",
        "decode",
    }
    drawn = {path.name for path in (folder / "plots").iterdir()}
    for name in ("attainment", "latency", "cdf", "queueing", "slo_scale"):
        assert {f"{name}.png", f"{name}.svg"} <= drawn
    assert all(path.stat().st_size > 1000 for path in (folder / "plots").iterdir())
