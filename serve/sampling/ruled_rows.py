"""RuledRows: the parameters that the functions of CPU and GPU for biases and bans both take."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, slots=True)
class RuledRows:
    """The rows of a step with biases or bans, as columns of ``[num_ruled]`` on the device."""

    row_ids: Tensor  # int64: index in the step's logits
    slots: Tensor  # int64: index in the cells
    num_cells: Tensor  # int32
    are_banned: Tensor  # int32: whether the bans hold, 0 or 1
    max_num_cells: int
