"""Whatever would hold up, at its first use, all that is queued behind: used before serving begins.

Before it hands out a kernel or pinned memory for the first time the driver waits for all that runs
on the device, on a busy prefill replica for a whole prompt. Meanwhile the GPU thread issues
nothing, and the pushes in its queue are late.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from serve.comm.tensor_parallel import TensorParallel
from serve.engine.dummy_steps import largest_steps, longest_context, one_decode, short_prompts
from serve.engine.rank_setup import RankSetup
from serve.engine.runner import Runner
from serve.kv.cache import KVCache

log = logging.getLogger(__name__)

_MAX_PINNED_POWER = 23  # of two: bytes; the largest step's integers take less
_SMALL_PINNED_POWER = 14
# Products of a weight, and which of their arguments has a row for each token.
_ROWS_AT: dict[Callable[..., Any], int] = {functional.linear: 0, torch.mm: 0, torch.addmm: 1}
_FEW_PROMPTS = 256  # flash-attn 4 has another kernel for more
_EVERY_COUNT_UP_TO = 512
_DENSE_UP_TO = 8192
_DENSE, _SPARSE = 256, 16  # the next count is further by this part of it


def load_kernels(setup: RankSetup, model: nn.Module, tp: TensorParallel) -> None:
    """Load, or compile, the kernels of the model's steps. All ranks of a replica together.

    They take device memory, so this comes before it is measured.
    """
    cache = KVCache(setup.layout, 1, setup.dtype, setup.device)
    limits = setup.limits
    runner = Runner(model, cache, tp, max(2, limits.max_num_seqs))
    runner.run(one_decode(setup))
    with Products() as products:
        runner.run(short_prompts(setup, 2))
    if min(limits.max_num_seqs, limits.max_num_batched_tokens // 2) > _FEW_PROMPTS:
        runner.run(short_prompts(setup, _FEW_PROMPTS + 1))
    begun_s = time.monotonic()
    num_runs = products.run(limits.max_num_batched_tokens, limits.max_num_seqs)
    torch.cuda.synchronize(setup.device)
    elapsed_s = time.monotonic() - begun_s
    log.info("rank %d: %d matrix products in %.1f s", setup.rank_info.rank, num_runs, elapsed_s)


def reserve_memory(setup: RankSetup, runner: Runner, kv_cache: KVCache) -> None:
    """Have torch take from the driver the memory that the largest steps need, and keep it.

    All ranks of a replica together.
    """
    warm_up_pinned_memory()
    held = kv_cache.num_blocks * kv_cache.layout.block_size
    for step in largest_steps(setup, min(longest_context(setup), held)):
        runner.run(step)
    kv_cache.blocks[0].zero_()  # as it was: what is masked there must at least be a number
    torch.cuda.synchronize(setup.device)


def warm_up_pinned_memory() -> None:
    """Fill torch's cache of pinned memory, which has lists by power of two."""
    held = [
        torch.empty(1 << power, dtype=torch.uint8, pin_memory=True)
        for power in range(_MAX_PINNED_POWER + 1)
        for _ in range(64 if power <= _SMALL_PINNED_POWER else 8)
    ]
    del held


@dataclass(frozen=True, slots=True)
class Product:
    """One matrix product of a weight, as the model asked for it."""

    function: Callable[..., Any]
    args: tuple[Any, ...]
    has_out: bool
    out_features: int

    @property
    def rows(self) -> Tensor:
        """The argument that has a row for each token: ``[num_rows, in_features]``."""
        rows: Tensor = self.args[_ROWS_AT[self.function]]
        return rows

    @property
    def signature(self) -> tuple[Any, ...]:
        """What the same product has in common: shapes, the rows' too, and the way it is called."""
        shapes = (
            (arg.shape, arg.stride()) if isinstance(arg, Tensor) else arg for arg in self.args
        )
        return self.function, self.has_out, *shapes

    def run(self, rows: Tensor) -> Tensor:
        """The product with other rows."""
        at = _ROWS_AT[self.function]
        args = (*self.args[:at], rows, *self.args[at + 1 :])
        out = {"out": rows.new_empty((len(rows), self.out_features))} if self.has_out else {}
        result: Tensor = self.function(*args, **out)
        return result


class Products(TorchFunctionMode):
    """Notes which matrix products are computed while it is entered, each kind once.

    cuBLAS has many kernels for one product, chooses by the number of rows, and loads a kernel when
    it is first chosen, also where all others are loaded at once (``CUDA_MODULE_LOADING=EAGER``).
    """

    def __init__(self) -> None:
        super().__init__()
        self._found: dict[tuple[Any, ...], Product] = {}

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """See ``TorchFunctionMode``."""
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if func in _ROWS_AT:
            product = Product(func, args, "out" in kwargs, result.shape[1])
            self._found.setdefault(product.signature, product)
        return result

    def __iter__(self) -> Iterator[Product]:
        """In the order in which they were first computed."""
        return iter(self._found.values())

    @torch.inference_mode()
    def run(self, max_num_tokens: int, max_num_sampled: int) -> int:
        """Compute each with one number of rows after another (``row_counts``); how many that were.

        A product that had fewer rows than the others was of the sampled tokens alone.
        """
        num_tokens = max((len(product.rows) for product in self), default=0)
        num_runs = 0
        for product in self:
            most = max_num_tokens if len(product.rows) == num_tokens else max_num_sampled
            rows = product.rows.new_zeros((most, product.rows.shape[1]))
            for count in row_counts(most):
                product.run(rows[:count])
                num_runs += 1
        return num_runs


def row_counts(most: int) -> Iterator[int]:
    """A sample of the numbers of rows up to ``most``, odd and even: all small ones, then fewer and
    fewer, since kernels are chosen by how their tiles fill the GPU.
    """
    count = 1
    while count < most:
        yield count
        if count < _EVERY_COUNT_UP_TO:
            count += 1
        else:
            count += count // (_DENSE if count < _DENSE_UP_TO else _SPARSE) | 1
    yield most
