"""PlacedRows: the rows of a step with their slots and parameters, as columns on the host."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from serve.protocol.plan import SampleRow
from serve.request import SamplingParams
from serve.sampling.noise import noise_streams

_GREEDY_BELOW = 1e-5  # in effect greedy, and 0 cannot be divided by
_NO_TOP_K = 2**31 - 1

# What a request asks, in a form of the same size for all. A filter that is off has the value that
# keeps all tokens. All are off for greedy requests.
PARAMS = np.dtype(
    [
        ("seed", np.int64),
        ("min_tokens", np.int64),
        ("top_p", np.float64),
        ("temperature", np.float32),  # 0: greedy
        ("min_p", np.float32),
        ("top_k", np.int32),
        ("repetition", np.float32),
        ("frequency", np.float32),
        ("presence", np.float32),
        ("num_cells", np.int32),  # biases and bans in serve.sampling.token_rules
        ("is_biased", np.bool_),
        ("is_filtered", np.bool_),
        ("is_penalised", np.bool_),
    ],
    align=True,
)


def encode_params(sampling: SamplingParams, num_cells: int) -> tuple[float, ...]:
    """Return the values of ``PARAMS`` for one request."""
    is_random = sampling.temperature >= _GREEDY_BELOW
    is_filtered = sampling.top_k > 0 or sampling.top_p < 1 or sampling.min_p > 0
    return (
        sampling.seed,
        sampling.min_tokens,
        min(sampling.top_p, 1.0) if is_random else 1.0,
        sampling.temperature if is_random else 0.0,
        sampling.min_p if is_random else 0.0,
        min(sampling.top_k or _NO_TOP_K, _NO_TOP_K) if is_random else _NO_TOP_K,
        sampling.repetition_penalty,
        sampling.frequency_penalty,
        sampling.presence_penalty,
        num_cells,
        bool(sampling.logit_bias),
        is_random and is_filtered,
        sampling.has_penalties,
    )


@dataclass(frozen=True, slots=True)
class PlacedRows:
    """The rows of a step, or some of them. Every method works on all of them at once."""

    rows: Sequence[SampleRow]
    slots: np.ndarray  # [num_rows], int64
    output_indices: np.ndarray  # [num_rows], int64
    params: np.ndarray  # [num_rows], PARAMS

    def select(self, index: np.ndarray) -> PlacedRows:
        """Return the rows at the positions ``index``."""
        rows = [self.rows[i] for i in index.tolist()]
        return PlacedRows(rows, self.slots[index], self.output_indices[index], self.params[index])

    def column(self, name: str) -> Tensor:
        """Copy one field of the parameters: ``[num_rows]``, contiguous."""
        return torch.from_numpy(self.params[name].copy())

    def streams(self) -> np.ndarray:
        """Return the noise stream of each row: int64, see ``serve.sampling.noise``."""
        return noise_streams(self.params["seed"], self.output_indices)

    def ban_ids(self) -> np.ndarray:
        """Return whether the bans of each row hold: its output is shorter than ``min_tokens``."""
        is_short: np.ndarray = self.output_indices < self.params["min_tokens"]
        return is_short

    def find_ruled(self) -> np.ndarray:
        """Return the positions of the rows with biases, or with bans that hold."""
        has_bans = (self.params["num_cells"] > 0) & self.ban_ids()
        return np.flatnonzero(self.params["is_biased"] | has_bans)

    def find_special(self) -> np.ndarray:
        """Return the positions of the rows for which more than temperature and noise matters."""
        is_special = self.params["is_penalised"] | self.params["is_filtered"]
        is_special[self.find_ruled()] = True
        return np.flatnonzero(is_special)
