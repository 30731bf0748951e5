"""HeadNorms: what queries and keys are normed with before they are rotated."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, slots=True)
class HeadNorms:
    """The norms of queries and keys, head by head: weights ``[head_dim]``."""

    query: Tensor
    key: Tensor
    eps: float
    around_one: bool = False
