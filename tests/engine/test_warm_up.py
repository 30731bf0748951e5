"""Warm-up: it finds every matrix product of a model, and runs it with enough numbers of rows."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

from serve.comm.tensor_parallel import TensorParallel
from serve.engine.runner import Runner
from serve.engine.warm_up import Products, row_counts
from serve.kv.cache import KVCache
from serve.model.registry import build_model
from serve.model.weights.load import load_weights
from serve.model_config.file import load_model_config
from serve.protocol.plan import SampleRow, Step, StepSequence
from serve.request import Request, SamplingParams, pack_ids
from tests.support.families import VARIANTS, write_variant


class Issued(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Records the matrix products that reach torch's dispatcher: rows, features in and out."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.shapes: set[tuple[int, int, int]] = set()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.linear):
            rows = args[1] if func.overloadpacket is torch.ops.aten.addmm else args[0]
            self.shapes.add((*rows.shape, result.shape[1]))
        return result


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_product_of_a_model_is_found(variant: str, tmp_path: Path) -> None:
    config = load_model_config(str(write_variant(tmp_path, variant, seed=1)))
    tp = TensorParallel(0, 1)
    model = build_model(config, tp, torch.float32, "cpu")
    load_weights(model, str(tmp_path), "auto", 0)
    runner = Runner(model, KVCache(config.kv_layout(16, 4, 1, 0), 2, torch.float32, "cpu"), tp, 2)
    request = Request(id="r", prompt=pack_ids((0,)), sampling=SamplingParams(max_tokens=1))
    sequences = tuple(StepSequence(0, (1, 2, 3), (block,), True) for block in range(2))
    with Issued() as issued, Products() as products:
        runner.run(Step(sequences, (SampleRow(request, 0),) * 2))
    assert len(issued.shapes) >= 4
    found = {(*p.rows.shape, p.run(p.rows).shape[1]) for p in products}
    assert found == issued.shapes
    with Issued() as again:
        products.run(7, 5)
    assert {shape[1:] for shape in again.shapes} == {shape[1:] for shape in issued.shapes}
    for num_rows, *features in issued.shapes:  # two of the six tokens are sampled
        assert (7 if num_rows == 6 else 5, *features) in again.shapes


def test_a_product_computes_what_the_model_computes() -> None:
    x, weight, bias = torch.randn(3, 4), torch.randn(5, 4), torch.randn(5)
    with Products() as products:
        for _ in range(3):  # layer after layer
            functional.linear(x, weight, bias)
            torch.addmm(bias, x, weight.t())
            torch.mm(x, weight.t(), out=torch.empty(3, 5))
    assert len(list(products)) == 3
    other = torch.randn(2, 4)
    for product in products:
        expected = other @ weight.t() + (0.0 if product.has_out else bias)
        assert torch.allclose(product.run(other), expected, atol=1e-6)


@pytest.mark.parametrize("most", [1, 2, 511, 512, 8192, 8193, 131072])
def test_row_counts_reach_from_one_to_the_most(most: int) -> None:
    counts = list(row_counts(most))
    assert counts == sorted(set(counts))
    assert (counts[0], counts[-1]) == (1, most)
    assert counts[:512] == list(range(1, min(most, 512) + 1))
    for before, after in pairwise(counts):
        assert after - before <= max(1, before // (128 if before < 8192 else 8))
