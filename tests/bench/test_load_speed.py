"""bench.micro.load_speed: a rank needs no more memory than its shard and one tensor."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

CONFIG: dict[str, Any] = {
    "architectures": ["InternLM2ForCausalLM"],
    "bias": False,
    "vocab_size": 30000,
    "hidden_size": 512,
    "intermediate_size": 2048,
    "num_hidden_layers": 6,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "torch_dtype": "float32",
}
LARGEST_BYTES = 30000 * 512 * 4  # the embedding


@pytest.mark.parametrize("num_ranks", [1, 2])
def test_memory_of_a_load(num_ranks: int, tmp_path: Path) -> None:
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text(json.dumps(CONFIG))
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(num_ranks)]
    done = subprocess.run(
        [sys.executable, *(launch if num_ranks > 1 else []), "-m", "bench.micro.load_speed",
         str(model), str(tmp_path / "weights")],
        env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, check=True,
    )  # fmt: skip
    found = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert sorted(one["rank"] for one in found) == list(range(num_ranks))
    whole_bytes = sum(path.stat().st_size for path in (tmp_path / "weights").glob("*.safetensors"))
    for one in found:
        assert one["tp"] == num_ranks
        assert one["load_gb_s"] > 0
        assert one["shard_bytes"] == pytest.approx(whole_bytes / num_ranks, rel=0.01)
        assert one["peak_own_bytes"] < one["shard_bytes"] + 2 * LARGEST_BYTES
