"""KVCache: the keys and values of one rank, in blocks."""

from __future__ import annotations

import torch
from torch import Tensor

from serve.engine.kv_layout import KVLayout


class KVCache:
    """``num_blocks`` blocks in one tensor.

    ``blocks`` is ``[num_blocks, num_layers, 2, block_size, num_kv_heads, head_dim]``: a block is
    one contiguous slab over all layers, so that moving it is one copy. Which sequence owns which
    block is not known here.
    """

    def __init__(
        self, layout: KVLayout, num_blocks: int, dtype: torch.dtype, device: torch.device | str
    ) -> None:
        if dtype.itemsize != layout.element_bytes:
            raise ValueError(f"{dtype} does not have {layout.element_bytes} bytes per element")
        self.layout = layout
        self.num_blocks = num_blocks
        # Zeros and not empty: a position that attention masks out must at least be a number.
        self.blocks = torch.zeros((num_blocks, *layout.block_shape), dtype=dtype, device=device)

    def layer(self, index: int) -> tuple[Tensor, Tensor]:
        """One layer's keys and values, ``[num_blocks, block_size, num_kv_heads, head_dim]``.

        Strided views: two blocks of a layer lie ``layout.block_bytes`` apart.
        """
        return self.blocks[:, index, 0], self.blocks[:, index, 1]

    def write(self, index: int, k: Tensor, v: Tensor, slot_mapping: Tensor) -> None:
        """Store ``k`` and ``v`` (``[num_tokens, num_kv_heads, head_dim]``) at their slots.

        ``slot_mapping`` is ``[num_tokens]``, int64: block * block_size + offset.
        """
        blocks = slot_mapping // self.layout.block_size
        offsets = slot_mapping % self.layout.block_size
        keys, values = self.layer(index)
        keys[blocks, offsets] = k
        values[blocks, offsets] = v
