"""Sampling on a GPU in a few kernels: the reference's ids, without its sort and its noise tensor.

Plain rows are sampled from the logits as they are. The other rows are copied first. Penalties,
bias, bans, temperature and filters change the copy, and the same kernel samples it.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from serve.device import columns_to_device
from serve.sampling.placed_rows import PlacedRows
from serve.sampling.slots import SamplingSlots
from serve.sampling.triton_filters import filter_logits
from serve.sampling.triton_sampling import sample_plain


class GpuSampler:
    """Samples the rows of every step, with the state of ``slots``."""

    def __init__(self, slots: SamplingSlots) -> None:
        self._slots = slots

    def sample(self, logits: Tensor, placed: PlacedRows, input_ids: Tensor, tokens: Tensor) -> None:
        """Write one id for each row of ``logits`` into ``tokens`` (``[num_rows]``, int64).

        ``logits``: ``[num_rows, vocab_size]``, not changed. ``input_ids``: see ``Penalties.apply``.
        """
        columns = [torch.from_numpy(placed.streams()), placed.column("temperature")]
        noise, temperature = columns_to_device(columns, logits.device)
        sample_plain(logits, temperature, noise, tokens)
        self.sample_special(logits, placed, input_ids, tokens)

    def sample_special(
        self, logits: Tensor, placed: PlacedRows, input_ids: Tensor, tokens: Tensor
    ) -> None:
        """Sample the rows that are not plain, and overwrite their ids in ``tokens``."""
        special = placed.find_special()
        if not len(special):
            return
        rows = placed.select(special)
        index, streams, top_p, top_k, log_min_p, divisor, temperature = columns_to_device(
            _special_columns(special, rows, logits.shape[1]), logits.device
        )
        part = logits[index].float()  # [num_special, vocab_size]
        self._slots.adjust(part, rows, input_ids[index])
        part.div_(divisor[:, None])
        filter_logits(part, log_min_p, top_k, top_p)
        ids = torch.empty_like(index)
        sample_plain(part, temperature, streams, ids)
        tokens[index] = ids


def _special_columns(special: np.ndarray, rows: PlacedRows, vocab_size: int) -> list[Tensor]:
    """Index, noise stream, top_p, top_k, log of min_p, divisor and temperature of each row."""
    temperature = rows.column("temperature")
    return [
        torch.from_numpy(special),
        torch.from_numpy(rows.streams()),
        rows.column("top_p"),
        rows.column("top_k").clamp(max=vocab_size),
        rows.column("min_p").log(),
        # The logits are divided before the filters. The sampling kernel then gets temperature 1,
        # because division by 1 changes nothing, and 0 for greedy rows.
        torch.where(temperature > 0, temperature, 1.0),
        (temperature > 0).float(),
    ]
