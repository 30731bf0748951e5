"""Runs the model: from a plan's step to sampled token ids, on one rank."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from serve.comm.messages import Step
from serve.engine.forward_batch import build_forward_batch
from serve.engine.kv_cache import KVCache
from serve.engine.sampler import sample


class Runner:
    """The model of one rank with its KV cache. All calls are made in the GPU thread."""

    def __init__(self, model: nn.Module, kv_cache: KVCache, block_size: int) -> None:
        self._model = model
        self._kv_cache = kv_cache
        self._block_size = block_size
        self._device = kv_cache.blocks.device

    @torch.inference_mode()
    def run(self, step: Step) -> Tensor | None:
        """Compute ``step``. The sampled ids ``[num_rows]`` int64 on the leader, else None.

        Followers take part in the forward pass; only the leader has logits, and samples.
        """
        batch = build_forward_batch(step, self._block_size, self._device)
        logits = self._model(batch, self._kv_cache)  # [num_sampled, vocab_size] or None
        if logits is None:
            return None
        return sample(logits, step.rows)
