"""Server: the job that a soak starts, with small pools and every limit on."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from bench.soak.model import CONTEXT, write_model
from bench.sweep.configuration import PORT, ROOT, Configuration, Launch
from bench.sweep.server_job import ServerJob

MAX_WAITING = 256
NUM_BLOCKS = 512

# Small pools, so that prompts wait and sequences are preempted, and limits that floods reach.
# The deadlines are shorter than the floods hold their connections.
LIMITS = (
    "--max-model-len", str(CONTEXT // 2),
    "--num-blocks", str(NUM_BLOCKS),
    "--block-size", "4",
    "--max-num-seqs", "64",
    "--prefill-max-num-batched-tokens", "256",
    "--kv-push-bytes", "64KiB",
    "--max-waiting", str(MAX_WAITING),
    "--max-waiting-tokens", "50000",
    "--max-connections", "1000",
    "--max-connections-per-address", "250",
    "--header-timeout-s", "2",
    "--body-timeout-s", "2",
    "--write-timeout-s", "2",
)  # fmt: skip

# A soft limit below what a flood opens: the server must raise it to the hard limit, or count.
_FEW_FILES = ("sh", "-c", 'ulimit -S -n "$0" && exec "$@"', "256")


def soak_job(folder: Path, num_ranks: int, options: Sequence[str]) -> ServerJob:
    """Return the job, not yet started. Its log and its model go into ``folder``."""
    model = write_model(folder / "model")
    log_path(folder).unlink(missing_ok=True)  # of an earlier soak; the job appends
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    ranks = ["--nproc-per-node", str(num_ranks), "-m", "serve.launch", "--port", PORT]
    command = (*_FEW_FILES, *torchrun, *ranks, "--model", str(model), *LIMITS, *options)
    env = {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    launch = Launch(command, ROOT, None, env)
    return ServerJob(Configuration("soak", num_ranks, (launch,)), folder)


def log_path(folder: Path) -> Path:
    """Return the path of the job's log."""
    return folder / "soak.log"
