"""From logits to token ids: penalties, bias, bans, temperature, filters and noise.

The noise of a token is a hash of (seed, output index, token id). So the choice for a request
depends on its own logits alone, not on the batch, the row, the device or earlier samples. The hash
gives ``u``, uniform in (0, 1), and ``-log(-log(u))`` is Gumbel noise. The token with the largest
``logit / temperature + noise`` is a sample of the softmax (the Gumbel-max trick).

The order is: repetition, frequency and presence penalties, logit bias, banned ids. Rows with a
temperature go on with temperature, min_p, top_k, top_p, noise. Equal logits are ranked by token id.

NaN logits cannot fail a batch. argmax takes a NaN for the largest value, so such a row gets some id
of the vocabulary, and the other rows are not affected. Nothing here waits for the device.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import torch
from torch import Tensor

from serve.device import to_device
from serve.protocol.messages import SampleRow
from serve.request import SamplingParams
from serve.sampling.noise import gumbel_noise, noise_streams
from serve.sampling.penalties import Penalties

_GREEDY_BELOW = 1e-5  # in effect greedy, and 0 cannot be divided by
_CHUNK_ELEMENTS = 1 << 22  # bounds the memory for noise, which has 64 bits an element


def is_plain(row: SampleRow) -> bool:
    """Return whether only temperature and noise matter to the row: no history, bias or filter."""
    sampling = row.request.sampling
    return not (
        sampling.has_penalties or sampling.logit_bias or row.banned_ids or _is_filtered(sampling)
    )


def _is_filtered(sampling: SamplingParams) -> bool:
    filters = sampling.top_k > 0 or sampling.top_p < 1 or sampling.min_p > 0
    return filters and not _is_greedy(sampling)


def plain_parameters(rows: Sequence[SampleRow]) -> tuple[list[float], np.ndarray]:
    """Return temperature (0: greedy) and noise stream (int64) of each row, for ``sample_plain``."""
    params = [row.request.sampling for row in rows]
    return [0.0 if _is_greedy(p) else p.temperature for p in params], _streams(rows)


def filter_parameters(
    rows: Sequence[SampleRow], vocab_size: int
) -> tuple[list[float], list[int], list[float]]:
    """Return min_p, top_k and top_p of each row.

    A filter that is off is 0, ``vocab_size`` and 1, respectively. All are off for greedy rows.
    """
    min_p, top_k, top_p = [], [], []
    for row in rows:
        sampling = row.request.sampling
        is_random = not _is_greedy(sampling)
        min_p.append(sampling.min_p if is_random else 0.0)
        top_k.append(min(sampling.top_k or vocab_size, vocab_size) if is_random else vocab_size)
        top_p.append(min(sampling.top_p, 1.0) if is_random else 1.0)
    return min_p, top_k, top_p


def adjust(
    logits: Tensor, rows: Sequence[SampleRow], input_ids: Tensor, penalties: Penalties
) -> None:
    """Apply penalties, bias and bans of each row to ``[num_rows, vocab]``, float32, in place.

    ``input_ids``: see ``Penalties.apply``.
    """
    penalties.apply(logits, rows, input_ids)
    _bias(logits, rows)


def sample(
    logits: Tensor, rows: Sequence[SampleRow], input_ids: Tensor, penalties: Penalties
) -> Tensor:
    """Sample one token id for each row: ``[num_rows]``, int64, on the device of ``logits``.

    ``logits`` is ``[num_rows, vocab]``, float32, may hold -inf, and is overwritten. ``input_ids``:
    see ``Penalties.apply``.
    """
    adjust(logits, rows, input_ids, penalties)
    tokens = logits.argmax(dim=-1)
    random_ids = [i for i, row in enumerate(rows) if not _is_greedy(row.request.sampling)]
    chunk = max(1, _CHUNK_ELEMENTS // logits.shape[1])
    for start in range(0, len(random_ids), chunk):
        part = random_ids[start : start + chunk]
        index = to_device(part, torch.int64, logits.device)
        tokens[index] = _sample_random(logits[index], [rows[i] for i in part])
    return tokens


def _is_greedy(sampling: SamplingParams) -> bool:
    return sampling.temperature < _GREEDY_BELOW


# --- bias and bans ------------------------------------------------------------------------------


def _bias(logits: Tensor, rows: Sequence[SampleRow]) -> None:
    """Add each row's logit bias, then set its banned ids to -inf. In place."""
    biased = [
        (index, token, bias)
        for index, row in enumerate(rows)
        for token, bias in row.request.sampling.logit_bias.items()
    ]
    if biased:
        row_ids, token_ids, bias = _cells(biased, logits)
        logits[row_ids, token_ids] += bias
    banned = [
        (index, token, float("-inf"))
        for index, row in enumerate(rows)
        for token in dict.fromkeys(row.banned_ids)
    ]
    if banned:
        row_ids, token_ids, minus_inf = _cells(banned, logits)
        logits[row_ids, token_ids] = minus_inf


def _cells(
    cells: Iterable[tuple[int, int, float]], logits: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Return row indices, token ids (int64) and values (float32) of single cells of ``logits``."""
    row_ids, token_ids, values = zip(*cells, strict=True)
    ids = to_device([*row_ids, *token_ids], torch.int64, logits.device)
    half = len(row_ids)
    return ids[:half], ids[half:], to_device(values, logits.dtype, logits.device)


# --- random rows --------------------------------------------------------------------------------


def _sample_random(logits: Tensor, rows: Sequence[SampleRow]) -> Tensor:
    """Sample rows of positive temperature; ``logits`` is overwritten. ``[num_rows]``, int64."""
    params = [row.request.sampling for row in rows]
    temperature = to_device([p.temperature for p in params], torch.float32, logits.device)
    logits.div_(temperature[:, None])
    _apply_min_p(logits, params)
    _apply_top_k_top_p(logits, params)
    streams = to_device(_streams(rows), torch.int64, logits.device)
    scores = gumbel_noise(streams, logits.shape[1])
    return scores.add_(logits).argmax(dim=-1)


def _apply_min_p(logits: Tensor, params: Sequence[SamplingParams]) -> None:
    """Rule out tokens less likely than ``min_p`` times the likeliest one. In place."""
    if not any(p.min_p > 0 for p in params):
        return
    ratio = to_device([p.min_p for p in params], torch.float32, logits.device)
    # p / p_max is exp(logit - max) and does not depend on other filters. A min_p of 0 gives a
    # threshold of -inf, which keeps all tokens.
    threshold = logits.amax(dim=-1, keepdim=True) + ratio.log()[:, None]
    logits.masked_fill_(logits < threshold, float("-inf"))


def _apply_top_k_top_p(logits: Tensor, params: Sequence[SamplingParams]) -> None:
    """Keep the ``top_k`` likeliest tokens, then the fewest that add up to ``top_p``. In place."""
    vocab = logits.shape[1]
    filtered = [i for i, p in enumerate(params) if 0 < p.top_k < vocab or p.top_p < 1]
    if not filtered:
        return
    index = to_device(filtered, torch.int64, logits.device)
    top_k = to_device([params[i].top_k or vocab for i in filtered], torch.int64, logits.device)
    top_p = to_device([params[i].top_p for i in filtered], torch.float64, logits.device)
    part = logits[index]  # [num_filtered, vocab]
    ranked, ids = part.sort(dim=-1, descending=True, stable=True)
    rank = torch.arange(vocab, device=logits.device)
    ranked.masked_fill_(rank >= top_k[:, None], float("-inf"))
    probs = ranked.softmax(dim=-1, dtype=torch.float64)
    # A token is kept while the tokens before it add up to less than top_p.
    before = probs.cumsum(dim=-1) - probs
    dropped = (before >= top_p[:, None]) & (top_p < 1)[:, None]
    dropped[:, 0] = False
    ranked.masked_fill_(dropped, float("-inf"))
    logits[index] = part.scatter_(1, ids, ranked)


def _streams(rows: Sequence[SampleRow]) -> np.ndarray:
    seeds = [row.request.sampling.seed for row in rows]
    return noise_streams(seeds, [row.output_index for row in rows])
