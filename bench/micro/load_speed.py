"""Measure how fast a rank loads its shard of a checkpoint, and a plain read of the same files.

    [torchrun --standalone --nproc-per-node 2 -m] bench.micro.load_speed MODEL_DIRECTORY FOLDER

MODEL_DIRECTORY has a config.json. Weights of random numbers that repeat are written to FOLDER as
sharded safetensors, unless they are there already. The ranks share the model by tensor parallelism
and load at the same time. Prints one JSON object a rank: GB/s of the plain read, GB/s of the load
(by the bytes of the rank's shard), and the peak of the host memory that belongs to the process.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from bench.micro.one_replica import join_ranks
from serve.comm.tensor_parallel import TensorParallel
from serve.device import pick_device
from serve.model.layers import parameter_shards
from serve.model.registry import build_model
from serve.model.weights.load import load_weights
from serve.model_config.config import ModelConfig
from serve.model_config.file import load_model_config
from serve.runtime.shutdown import exit_now
from serve.topology import read_rank_info

FILE_BYTES = 4 << 30
_SAMPLE_S = 0.01
_READ_BYTES = 16 << 20
_NUM_DRAWN = 1 << 20  # random numbers; larger tensors repeat them


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path, help="directory with a config.json")
    parser.add_argument("folder", type=Path, help="takes the checkpoint")
    args = parser.parse_args()
    rank_info = read_rank_info(os.environ)
    device = pick_device(rank_info.local_rank)
    config = load_model_config(str(args.model))
    tp = join_ranks(rank_info, device)
    if tp.is_leader and not (args.folder / "config.json").exists():
        write_checkpoint(config, args.model, args.folder)
    tp.broadcast(torch.zeros(1, device=device))  # a barrier: the checkpoint is complete
    plain_gb_s = read_plainly(args.folder) if tp.is_leader else 0.0
    tp.broadcast(torch.zeros(1, device=device))
    dtype: torch.dtype = getattr(torch, config.dtype)
    model = build_model(config, tp, dtype, device)
    shard_bytes = sum(parameter.nbytes for parameter in model.parameters())
    with PeakMemory() as peak:
        started_s = time.perf_counter()
        load_weights(model, str(args.folder), "auto", 0)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        elapsed_s = time.perf_counter() - started_s
    found = {
        "rank": rank_info.rank,
        "tp": tp.size,
        "shard_bytes": shard_bytes,
        "plain_gb_s": plain_gb_s,
        "load_gb_s": shard_bytes / elapsed_s / 1e9,
        "load_s": elapsed_s,
        "peak_own_bytes": peak.num_bytes,
    }
    print(json.dumps(found), flush=True)
    tp.broadcast(torch.zeros(1, device=device))
    exit_now(0)


def write_checkpoint(config: ModelConfig, model: Path, folder: Path) -> None:
    """Write files of at most ``FILE_BYTES`` (but whole tensors), their index, then config.json."""
    folder.mkdir(parents=True, exist_ok=True)
    dtype: torch.dtype = getattr(torch, config.dtype)
    whole = build_model(config, TensorParallel(0, 1), dtype, "meta")
    shapes = {name: shard.shape for name, _, shard in parameter_shards(whole)}
    weight_map: dict[str, str] = {}
    for number, names in enumerate(_files(shapes, dtype.itemsize), start=1):
        file = f"model-{number:05}.safetensors"
        save_file({name: _filled(shapes[name], dtype) for name in names}, folder / file)
        weight_map |= dict.fromkeys(names, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    shutil.copy(model / "config.json", folder / "config.json")


def _filled(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Fill a tensor with repeating random numbers, because drawing 20 billion takes minutes."""
    drawn = torch.empty(_NUM_DRAWN, dtype=dtype).normal_(0, 0.02)
    flat = torch.empty(math.prod(shape), dtype=dtype)
    for part in torch.split(flat, _NUM_DRAWN):
        part.copy_(drawn[: len(part)])
    return flat.view(shape)


def _files(shapes: dict[str, tuple[int, ...]], itemsize: int) -> Iterator[list[str]]:
    names: list[str] = []
    num_bytes = 0
    for name, shape in shapes.items():
        size = math.prod(shape) * itemsize
        if names and num_bytes + size > FILE_BYTES:
            yield names
            names, num_bytes = [], 0
        names.append(name)
        num_bytes += size
    yield names


def read_plainly(folder: Path) -> float:
    """Return the GB/s of reading every weight file once, from disk or page cache."""
    buffer = bytearray(_READ_BYTES)
    num_bytes = 0
    started_s = time.perf_counter()
    for path in sorted(folder.glob("*.safetensors")):
        with path.open("rb", buffering=0) as file:
            while count := file.readinto(buffer):
                num_bytes += count
    return num_bytes / (time.perf_counter() - started_s) / 1e9


class PeakMemory:
    """The peak of this process's own memory during a ``with`` block, above that before it.

    Mapped files do not count, because the system can take their memory back at any time.
    """

    def __init__(self) -> None:
        self.num_bytes = 0
        self._before = _own_bytes()
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)

    def __enter__(self) -> PeakMemory:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()

    def _sample(self) -> None:
        while not self._done.wait(_SAMPLE_S):
            self.num_bytes = max(self.num_bytes, _own_bytes() - self._before)


def _own_bytes() -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) << 10
    raise RuntimeError("/proc/self/status has no RssAnon")


if __name__ == "__main__":
    main()
