"""PenalisedRows: the parameters that the penalty functions of CPU and GPU both take."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, slots=True)
class PenalisedRows:
    """The rows of a step that carry penalties, as columns of ``[num_penalised]`` on the device."""

    row_ids: Tensor  # int64: index in the step's logits
    slots: Tensor  # int64: index in the counts
    increments: Tensor  # int32: added to the count of the row's input token
    repetition: Tensor  # float32
    frequency: Tensor  # float32
    presence: Tensor  # float32
