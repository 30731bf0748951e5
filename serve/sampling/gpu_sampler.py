"""Sampling on a GPU in a few kernels: the reference's ids, without its sort and its noise tensor.

Plain rows are sampled from the logits as they are. The other rows are copied first. Penalties,
bias, bans, temperature and filters change the copy, and the same kernel samples it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from serve.device import columns_to_device
from serve.protocol.messages import SampleRow
from serve.sampling.penalties import Penalties
from serve.sampling.sampler import adjust, filter_parameters, is_plain, plain_parameters
from serve.sampling.triton_filters import filter_logits
from serve.sampling.triton_sampling import sample_plain


class GpuSampler:
    """Samples the rows of every step, with the counts of ``penalties``."""

    def __init__(self, penalties: Penalties) -> None:
        self._penalties = penalties

    def sample(
        self, logits: Tensor, rows: Sequence[SampleRow], input_ids: Tensor, tokens: Tensor
    ) -> None:
        """Write one id for each row of ``logits`` into ``tokens`` (``[num_rows]``, int64).

        ``logits``: ``[num_rows, vocab_size]``, not changed. ``input_ids``: see ``Penalties.apply``.
        """
        temperatures, streams = plain_parameters(rows)
        columns = [
            torch.from_numpy(streams),
            torch.tensor(temperatures, dtype=torch.float32),
        ]
        noise, temperature = columns_to_device(columns, logits.device)
        sample_plain(logits, temperature, noise, tokens)
        self.sample_special(logits, rows, input_ids, tokens)

    def sample_special(
        self, logits: Tensor, rows: Sequence[SampleRow], input_ids: Tensor, tokens: Tensor
    ) -> None:
        """Sample the rows that are not plain, and overwrite their ids in ``tokens``."""
        special = [index for index, row in enumerate(rows) if not is_plain(row)]
        if not special:
            return
        special_rows = [rows[index] for index in special]
        index, streams, top_p, top_k, log_min_p, divisor, temperature = columns_to_device(
            _special_columns(special, special_rows, logits.shape[1]), logits.device
        )
        part = logits[index].float()  # [num_special, vocab_size]
        adjust(part, special_rows, input_ids[index], self._penalties)
        part.div_(divisor[:, None])
        filter_logits(part, log_min_p, top_k, top_p)
        ids = torch.empty_like(index)
        sample_plain(part, temperature, streams, ids)
        tokens[index] = ids


def _special_columns(
    special: list[int], rows: Sequence[SampleRow], vocab_size: int
) -> list[Tensor]:
    """Index, noise stream, top_p, top_k, log of min_p, divisor and temperature of each row."""
    temperatures, streams = plain_parameters(rows)
    min_p, top_k, top_p = filter_parameters(rows, vocab_size)
    temperature = torch.tensor(temperatures, dtype=torch.float32)
    return [
        torch.tensor(special, dtype=torch.int64),
        torch.from_numpy(streams),
        torch.tensor(top_p, dtype=torch.float64),
        torch.tensor(top_k, dtype=torch.int32),
        torch.tensor(min_p, dtype=torch.float32).log(),
        # The logits are divided before the filters. The sampling kernel then gets temperature 1,
        # because division by 1 changes nothing, and 0 for greedy rows.
        torch.where(temperature > 0, temperature, 1.0),
        (temperature > 0).float(),
    ]
