"""HeadNorms: the weights that norm queries and keys, head by head, before the rotation."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, slots=True)
class HeadNorms:
    """The RMS norms of queries and keys; both weights are ``[head_dim]``. See ``ops.rms_norm``."""

    query: Tensor
    key: Tensor
    eps: float
    unit_offset: bool = False
