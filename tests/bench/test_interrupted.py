"""Ctrl-C during a load: what was measured is reported, marked as interrupted."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from bench.load.report import Objectives, run_file
from bench.load.table import render
from bench.sweep.configuration import Configuration, Launch
from bench.sweep.server_job import ServerJob
from tests.bench.test_report import made
from tests.support.paths import ROOT

FAKE = ROOT / "tests" / "support" / "fake_openai.py"


@pytest.fixture
def held_server(tmp_path: Path) -> Iterator[tuple[str, Path]]:
    """Run a server that answers six requests and holds the others; it writes to the FIFO then."""
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    command = (sys.executable, str(FAKE), "--port", "{port}", "--hold-after", "6", str(fifo))
    with ServerJob(Configuration("fake", 1, (Launch(command),)), tmp_path / "logs") as job:
        yield job.base_urls[0], fifo


@pytest.mark.parametrize("processes", [1, 2])
def test_ctrl_c_reports_the_requests_that_have_ended(
    held_server: tuple[str, Path], tmp_path: Path, processes: int
) -> None:
    url, fifo = held_server
    output = tmp_path / "run.json"
    command = [
        sys.executable, "-m", "bench.serve", "--base-url", url, "--output", str(output),
        "--arrivals", "closed", "--concurrency", str(processes), "--processes", str(processes),
        "--num-requests", "20", "--input-len", "8", "--output-len", "4", "--num-warmups", "0",
        "--ttft-slo", "60",
    ]  # fmt: skip
    with subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        preexec_fn=_heed_ctrl_c,
    ) as load:  # fmt: skip
        fifo.read_text()  # waits until a request is held
        load.send_signal(signal.SIGINT)
        text, _ = load.communicate()
    assert load.returncode == 130, text
    run = json.loads(output.read_bytes())
    assert run["interrupted"] is True
    # With two processes the last answer of the other one may be on its way.
    ended = run["summary"]["num_completed"]
    assert ended == 6 if processes == 1 else 5 <= ended <= 6
    assert run["summary"]["num_requests"] == len(run["requests"]) == ended
    assert run["summary"]["num_errors"] == 0
    assert f"INTERRUPTED: only the {ended} of 20 requests" in text
    assert "within the objectives" in text


def _heed_ctrl_c() -> None:
    # A job in the background of a shell ignores SIGINT, and so would what it starts.
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def test_a_complete_run_is_not_marked() -> None:
    head = {"interrupted": False, "workload": {"num_requests": 1}}
    run = run_file(head, [made(0.0, [0.5])], 0.0, Objectives(), [])
    assert "INTERRUPTED" not in render(run)
