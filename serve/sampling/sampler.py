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

import numpy as np
import torch
from torch import Tensor

from serve.device import to_device
from serve.sampling.noise import gumbel_noise
from serve.sampling.placed_rows import PlacedRows
from serve.sampling.slots import SamplingSlots

_CHUNK_ELEMENTS = 1 << 22  # bounds the memory for noise, which has 64 bits an element


def sample(logits: Tensor, placed: PlacedRows, input_ids: Tensor, slots: SamplingSlots) -> Tensor:
    """Sample one token id for each row: ``[num_rows]``, int64, on the device of ``logits``.

    ``logits`` is ``[num_rows, vocab]``, float32, may hold -inf, and is overwritten. ``input_ids``
    is each row's newest token, ``[num_rows]``, int64. ``placed`` comes from ``slots``.
    """
    slots.adjust(logits, placed, input_ids)
    tokens = logits.argmax(dim=-1)
    random_rows = np.flatnonzero(placed.params["temperature"] > 0)
    chunk = max(1, _CHUNK_ELEMENTS // logits.shape[1])
    for start in range(0, len(random_rows), chunk):
        part = random_rows[start : start + chunk]
        index = to_device(part, torch.int64, logits.device)
        tokens[index] = _sample_random(logits[index], placed.select(part))
    return tokens


def _sample_random(logits: Tensor, placed: PlacedRows) -> Tensor:
    """Sample rows of positive temperature; ``logits`` is overwritten. ``[num_rows]``, int64."""
    logits.div_(placed.column("temperature").to(logits.device)[:, None])
    apply_filters(logits, placed)
    streams = to_device(placed.streams(), torch.int64, logits.device)
    scores = gumbel_noise(streams, logits.shape[1])
    return scores.add_(logits).argmax(dim=-1)


def apply_filters(logits: Tensor, placed: PlacedRows) -> None:
    """Write -inf over the logits that min_p, top_k and top_p rule out, in place.

    ``logits`` are divided by the temperature already.
    """
    _apply_min_p(logits, placed.column("min_p"))
    _apply_top_k_top_p(logits, placed.column("top_k"), placed.column("top_p"))


def _apply_min_p(logits: Tensor, min_p: Tensor) -> None:
    """Rule out tokens less likely than ``min_p`` times the likeliest one. In place."""
    if not bool((min_p > 0).any()):
        return
    # p / p_max is exp(logit - max) and does not depend on other filters. A min_p of 0 gives a
    # threshold of -inf, which keeps all tokens.
    ratio = min_p.to(logits.device)[:, None]
    threshold = logits.amax(dim=-1, keepdim=True) + ratio.log()
    logits.masked_fill_(logits < threshold, float("-inf"))


def _apply_top_k_top_p(logits: Tensor, top_k: Tensor, top_p: Tensor) -> None:
    """Keep the ``top_k`` likeliest tokens, then the fewest that add up to ``top_p``. In place."""
    vocab = logits.shape[1]
    filtered = ((top_k < vocab) | (top_p < 1)).nonzero()[:, 0]
    if not len(filtered):
        return
    index = filtered.to(logits.device)
    top_k, top_p = top_k[filtered].to(logits.device), top_p[filtered].to(logits.device)
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
