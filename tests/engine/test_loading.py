"""The error of a rank that cannot be loaded."""

from __future__ import annotations

import pytest
import torch

from serve.config.server import parse_args
from serve.engine import loading
from serve.engine.rank_setup import RankSetup
from serve.topology import RankInfo, build_topology


def test_a_device_that_is_too_small_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    """The error keeps the size from torch's message, but not its paragraph on fragmentation."""
    torch_message = (
        "CUDA out of memory. Tried to allocate 20.00 GiB. GPU 0 has a total capacity of 79.10 GiB "
        "of which 3.00 GiB is free. If reserved but unallocated memory is large try setting\n..."
    )

    def build_model(*_: object) -> None:
        raise torch.OutOfMemoryError(torch_message)

    monkeypatch.setattr(loading, "build_model", build_model)
    config = parse_args(["--mode", "colocated"], 1)
    topology = build_topology(config.replica_specs, 0, mixed=True)
    setup = RankSetup(config, topology, RankInfo(0, 1, 0, 1), torch.device("cpu"))
    with pytest.raises(ValueError, match="rank 0: cpu is too small") as caught:
        loading.load_rank(setup, lambda done, total: None)
    text = str(caught.value)
    assert "\n" not in text
    assert "Tried to allocate 20.00 GiB. Give replicas more ranks (--replica-spec)" in text
