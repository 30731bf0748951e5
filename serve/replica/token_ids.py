"""TokenIds: the tokens of one sequence, of which the prompt is shared with its request."""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Sequence
from typing import Any, overload

import numpy as np

from serve.request import unpack_ids


class TokenIds(Sequence[int]):
    """A prompt, viewed in the bytes of its request, and the output, in an array of int32.

    A slice holds its own tokens or is a view of the prompt, which does not change. So another
    thread may read a slice while tokens are appended here.
    """

    __slots__ = ("_prompt", "output")

    def __init__(self, prompt: bytes, output_ids: Iterable[int] = ()) -> None:
        self._prompt = unpack_ids(prompt)
        self.output = array("i", output_ids)

    def append(self, token_id: int) -> None:
        """Add an output token."""
        self.output.append(token_id)

    def __len__(self) -> int:
        return len(self._prompt) + len(self.output)

    @overload
    def __getitem__(self, index: int) -> int: ...

    @overload
    def __getitem__(self, index: slice) -> Sequence[int]: ...

    def __getitem__(self, index: int | slice) -> int | Sequence[int]:
        num_prompt = len(self._prompt)
        if isinstance(index, slice):
            start, stop, step = index.indices(len(self))
            if step != 1:
                return [self[i] for i in range(start, stop, step)]
            if stop <= num_prompt:
                return self._prompt[start:stop]
            output = self.output[max(0, start - num_prompt) : stop - num_prompt]
            return array("i", self._prompt[start:]) + output if start < num_prompt else output
        position = index if index >= 0 else index + len(self)
        if not 0 <= position < len(self):
            raise IndexError(f"token {index} of {len(self)}")
        if position < num_prompt:
            return self._prompt[position]
        return self.output[position - num_prompt]

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        """Return a new array, for ``numpy.array``."""
        if copy is False:
            raise ValueError("the tokens of a sequence cannot be shared with an array")
        return np.array(self[:], dtype or np.int32)
