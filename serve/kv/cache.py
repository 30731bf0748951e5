"""KVCache: the keys and values of one rank, in blocks."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from serve.model_config.kv_layout import KVLayout


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    # numpy gets zero pages from the system on first use. torch writes zeros, which would allocate
    # all pages at once.
    num_bytes = math.prod(shape) * dtype.itemsize
    return torch.from_numpy(np.zeros(num_bytes, np.uint8)).view(dtype).view(shape)


class KVCache:
    """``num_blocks`` blocks in one tensor.

    ``blocks`` is ``[num_blocks, num_layers, num_planes, block_size, num_kv_heads, head_dim]``. A
    block is one contiguous slab over all layers, so one copy moves it. The block pool of the
    replica, not this class, knows the owner of each block. Raises ``ValueError`` if the element
    size of ``dtype`` differs from the layout's.
    """

    def __init__(
        self, layout: KVLayout, num_blocks: int, dtype: torch.dtype, device: torch.device | str
    ) -> None:
        if dtype.itemsize != layout.element_bytes:
            raise ValueError(f"{dtype} does not have {layout.element_bytes} bytes per element")
        self.layout = layout
        self.num_blocks = num_blocks
        # Zeros, because attention reads positions that it masks out, and NaN there would spread.
        self.blocks = _zeros((num_blocks, *layout.block_shape), dtype, torch.device(device))

    def layer(self, index: int) -> tuple[Tensor, ...]:
        """Return a layer's planes, keys first.

        Each is a strided view ``[num_blocks, block_size, num_kv_heads, head_dim]`` in which blocks
        lie ``layout.block_bytes`` apart.
        """
        return self.blocks[:, index].unbind(1)
