"""Warm-up: use every kernel and allocation once before serving, because the first use is slow.

When the driver loads a kernel or allocates pinned memory for the first time, it waits for all work
on the device. On a busy prefill replica that is a whole prompt. Meanwhile the GPU thread issues
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

_MAX_PINNED_POWER = 23  # 2**23 bytes; the integers of the largest step take less
_SMALL_PINNED_POWER = 14
# The functions that multiply by a weight, and the argument of each that has a row for each token.
_ROWS_ARG: dict[Callable[..., Any], int] = {functional.linear: 0, torch.mm: 0, torch.addmm: 1}
_FEW_PROMPTS = 256  # flash-attn 4 uses another kernel for more
# Numbers of rows to try: all up to the first limit, then in steps of count / _DENSE up to the
# second, then in steps of count / _SPARSE.
_EVERY_COUNT_UP_TO = 512
_DENSE_UP_TO = 8192
_DENSE, _SPARSE = 256, 16


def load_kernels(setup: RankSetup, model: nn.Module, tp: TensorParallel) -> None:
    """Load, or compile, the kernels of the model's steps. A collective of the replica's ranks.

    Kernels take device memory, so this must come before the memory is measured.
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
    """Make torch allocate the memory of the largest steps, which it keeps in its cache.

    A collective of the replica's ranks.
    """
    warm_up_pinned_memory()
    capacity = kv_cache.num_blocks * kv_cache.layout.block_size
    for step in largest_steps(setup, min(longest_context(setup), capacity)):
        runner.run(step)
    kv_cache.blocks[0].zero_()  # as before: masked positions must not hold NaN
    torch.cuda.synchronize(setup.device)


def warm_up_pinned_memory() -> None:
    """Fill torch's cache of pinned memory, which has one list per power of two."""
    buffers = [
        torch.empty(1 << power, dtype=torch.uint8, pin_memory=True)
        for power in range(_MAX_PINNED_POWER + 1)
        for _ in range(64 if power <= _SMALL_PINNED_POWER else 8)
    ]
    del buffers


@dataclass(frozen=True, slots=True)
class Product:
    """One product of a weight and a matrix with a row for each token, as the model calls it."""

    function: Callable[..., Any]
    args: tuple[Any, ...]
    has_out: bool
    out_features: int

    @property
    def rows(self) -> Tensor:
        """The argument that has a row for each token: ``[num_rows, in_features]``."""
        rows: Tensor = self.args[_ROWS_ARG[self.function]]
        return rows

    @property
    def signature(self) -> tuple[Any, ...]:
        """The function and the shapes of all arguments. Equal products have the same."""
        shapes = (
            (arg.shape, arg.stride()) if isinstance(arg, Tensor) else arg for arg in self.args
        )
        return self.function, self.has_out, *shapes

    def run(self, rows: Tensor) -> Tensor:
        """Compute the product with other rows."""
        index = _ROWS_ARG[self.function]
        args = (*self.args[:index], rows, *self.args[index + 1 :])
        out = {"out": rows.new_empty((len(rows), self.out_features))} if self.has_out else {}
        result: Tensor = self.function(*args, **out)
        return result


class Products(TorchFunctionMode):
    """Records the matrix products that are computed while it is active, each kind once.

    cuBLAS has many kernels for one product and chooses by the number of rows. It loads a kernel
    when it first chooses it, even with ``CUDA_MODULE_LOADING=EAGER``, which loads all others at
    once.
    """

    def __init__(self) -> None:
        super().__init__()
        self._found: dict[tuple[Any, ...], Product] = {}

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Record a product; see ``TorchFunctionMode``."""
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if func in _ROWS_ARG:
            product = Product(func, args, "out" in kwargs, result.shape[1])
            self._found.setdefault(product.signature, product)
        return result

    def __iter__(self) -> Iterator[Product]:
        """Iterate in the order in which the products were first computed."""
        return iter(self._found.values())

    @torch.inference_mode()
    def run(self, max_num_tokens: int, max_num_sampled: int) -> int:
        """Compute each product with every number of rows of ``row_counts``; returns the count.

        A product with fewer rows than the others has a row for each sampled token only.
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
    """Yield numbers of rows up to ``most``, odd and even: all small ones, then ever fewer.

    Large ones need fewer, because cuBLAS chooses kernels by how their tiles fill the GPU.
    """
    count = 1
    while count < most:
        yield count
        if count < _EVERY_COUNT_UP_TO:
            count += 1
        else:
            count += count // (_DENSE if count < _DENSE_UP_TO else _SPARSE) | 1
    yield most
