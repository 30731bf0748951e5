"""A server under test and its processes: ports, health, and ending all that was started."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

import psutil
import pytest

from bench.sweep.child import Child, first_ended
from bench.sweep.configuration import Configuration, Launch
from bench.sweep.server_job import ServerFailed, ServerJob
from tests.support.paths import ROOT

FAKE = f"{{python}} {ROOT / 'tests' / 'support' / 'fake_openai.py'} --port {{port}}"


def test_a_taken_port_is_no_server_of_ours(tmp_path: Path) -> None:
    command = tuple(FAKE.replace("{python}", sys.executable).split())
    configuration = Configuration("there", 1, (Launch(command),))
    with ServerJob(configuration, tmp_path) as job:
        port = int(job.base_urls[0].rpartition(":")[2])
        with (
            pytest.raises(ServerFailed, match=f"port {port} is not free"),
            ServerJob(configuration, tmp_path, base_port=port),
        ):
            pytest.fail("it has taken the other for its own")


def test_a_server_that_is_never_healthy(tmp_path: Path) -> None:
    command = (sys.executable, "-c", "import time; print('thinking', flush=True); time.sleep(600)")
    configuration = Configuration("slow", 1, (Launch(command),))
    with (
        pytest.raises(ServerFailed, match=r"(?s)not healthy after 0\.5 s.*thinking"),
        ServerJob(configuration, tmp_path, start_timeout_s=0.5),
    ):
        pytest.fail("it is not healthy")


STUBBORN = """
import os, signal, subprocess, sys, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], process_group=0)
print(os.getpid(), child.pid, flush=True)
time.sleep(600)
"""


@pytest.mark.parametrize("leader_is_gone", [False, True])
def test_a_child_ends_with_all_it_started(tmp_path: Path, leader_is_gone: bool) -> None:
    """Also a process that ignores SIGTERM, and one that leads its own process group."""
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    bystander = Child([sys.executable, "-c", "import time; time.sleep(600)"], None)
    with os.fdopen(os.open(fifo, os.O_RDWR), "r+b", buffering=0) as log:
        child = Child([sys.executable, "-c", STUBBORN], None, log=log)
        pids = [int(word) for word in log.readline().split()]
    started = [psutil.Process(pid) for pid in pids]
    if leader_is_gone:
        child.signal(signal.SIGKILL)
        assert first_ended([child], 20) is child
        assert child.status() == -signal.SIGKILL
    child.signal(signal.SIGTERM)
    child.end(0.2)
    assert not psutil.wait_procs(started, timeout=20)[1]
    assert first_ended([bystander], 0) is None
    bystander.signal(signal.SIGTERM)
    assert first_ended([bystander], 20) is bystander
    assert bystander.status() == -signal.SIGTERM
    bystander.end(0)
