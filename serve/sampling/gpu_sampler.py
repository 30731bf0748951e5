"""Sampling on a GPU in a few kernels: the ids of the reference, without its sort and its noise.

Plain rows are sampled from the logits as they are. The others are copied first, and the copy takes
penalties, bias, bans, temperature and filters before it is sampled in the same way.
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


def sample_on_gpu(
    logits: Tensor,
    rows: Sequence[SampleRow],
    input_ids: Tensor,
    penalties: Penalties,
    tokens: Tensor,
) -> None:
    """One id for each row of ``logits`` (``[num_rows, vocab_size]``), into ``tokens`` (int64).

    ``input_ids``: see ``Penalties.apply``.
    """
    temperatures, streams = plain_parameters(rows)
    columns = [
        torch.from_numpy(streams),
        torch.tensor(temperatures, dtype=torch.float32),
    ]
    noise, heat = columns_to_device(columns, logits.device)
    sample_plain(logits, heat, noise, tokens)
    sample_special(logits, rows, input_ids, penalties, tokens)


def sample_special(
    logits: Tensor,
    rows: Sequence[SampleRow],
    input_ids: Tensor,
    penalties: Penalties,
    tokens: Tensor,
) -> None:
    """Sample anew, into ``tokens``, the rows that are not plain. ``logits`` stays as it is."""
    special = [index for index, row in enumerate(rows) if not is_plain(row)]
    if not special:
        return
    chosen = [rows[index] for index in special]
    temperatures, streams = plain_parameters(chosen)
    min_p, top_k, top_p = filter_parameters(chosen, logits.shape[1])
    heat = torch.tensor(temperatures, dtype=torch.float32)
    columns = [
        torch.tensor(special, dtype=torch.int64),
        torch.from_numpy(streams),
        torch.tensor(top_p, dtype=torch.float64),
        torch.tensor(top_k, dtype=torch.int32),
        torch.tensor(min_p, dtype=torch.float32).log(),
        torch.where(heat > 0, heat, 1.0),
        (heat > 0).float(),
    ]
    index, noise, mass, rank, floor, divisor, heat = columns_to_device(columns, logits.device)
    part = logits[index].float()  # [num_special, vocab_size]
    adjust(part, chosen, input_ids[index], penalties)
    part.div_(divisor[:, None])
    filter_logits(part, floor, rank, mass)
    ids = torch.empty_like(index)
    # What is divided already is divided by 1 once more, which changes nothing; 0 is greedy.
    sample_plain(part, heat, noise, ids)
    tokens[index] = ids
