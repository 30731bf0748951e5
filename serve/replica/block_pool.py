"""Which KV blocks are free; it knows ids, not tensors."""

from __future__ import annotations

from collections.abc import Iterable


class BlockPool:
    """Hands out block ids ``0 .. num_blocks - 1``. A block is free or owned by one holder.

    The pool does not know the holders; it refuses to take back a block that is already free, so a
    second owner shows itself at the first double free.
    """

    def __init__(self, num_blocks: int) -> None:
        self.num_blocks = num_blocks
        self._free = list(range(num_blocks - 1, -1, -1))
        self._is_free = bytearray(b"\x01" * num_blocks)

    @property
    def num_free(self) -> int:
        """Blocks that nobody owns."""
        return len(self._free)

    def allocate(self, count: int) -> list[int]:
        """``count`` blocks, now owned by the caller. ``ValueError`` if there are fewer free."""
        if count > len(self._free):
            raise ValueError(f"{count} blocks asked for, {len(self._free)} free")
        blocks = [self._free.pop() for _ in range(count)]
        for block in blocks:
            self._is_free[block] = 0
        return blocks

    def free(self, blocks: Iterable[int]) -> None:
        """Take ``blocks`` back from their owner. ``ValueError`` if one of them is free already."""
        for block in blocks:
            if self._is_free[block]:
                raise ValueError(f"block {block} is freed twice")
            self._is_free[block] = 1
            self._free.append(block)
