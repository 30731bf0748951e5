"""BlockPool: which KV blocks of a replica are free. It holds ids, no tensors."""

from __future__ import annotations

from collections.abc import Iterable


class BlockPool:
    """Allocates block ids ``0 .. num_blocks - 1``. A block is free or owned by one holder.

    The pool does not record the holders. It refuses to free a block that is free already, so a bug
    that gives a block two owners shows at the first double free.
    """

    def __init__(self, num_blocks: int) -> None:
        self.num_blocks = num_blocks
        self._free = list(range(num_blocks - 1, -1, -1))
        self._is_free = bytearray(b"\x01" * num_blocks)

    @property
    def num_free(self) -> int:
        """Blocks without an owner."""
        return len(self._free)

    def allocate(self, count: int) -> list[int]:
        """Return ``count`` blocks, which the caller then owns.

        Raises ``ValueError`` if fewer are free.
        """
        if count > len(self._free):
            raise ValueError(f"{count} blocks asked for, {len(self._free)} free")
        blocks = [self._free.pop() for _ in range(count)]
        for block in blocks:
            self._is_free[block] = 0
        return blocks

    def free(self, blocks: Iterable[int]) -> None:
        """Take ``blocks`` back from their owner. Raises ``ValueError`` if one is free already."""
        for block in blocks:
            if self._is_free[block]:
                raise ValueError(f"block {block} is freed twice")
            self._is_free[block] = 1
            self._free.append(block)
