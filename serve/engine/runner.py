"""Runner: runs the model on one rank, from a step to sampled token ids."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from serve.comm.tensor_parallel import TensorParallel
from serve.kv.cache import KVCache
from serve.model.forward_batch import build_forward_batch
from serve.protocol.plan import Step
from serve.sampling.placed_rows import PlacedRows
from serve.sampling.sampler import sample
from serve.sampling.slots import SamplingSlots

if TYPE_CHECKING:
    from serve.engine.decode_graphs import DecodeGraphs  # needs Triton, as GPUs do
    from serve.sampling.gpu_sampler import GpuSampler


class Runner:
    """The model of one rank with its KV cache. All methods are called in the GPU thread.

    ``sampled`` holds the ids that the last step sampled, one for each row, on every rank of the
    replica. The next step can use them as inputs before the host knows them.
    """

    def __init__(
        self,
        model: nn.Module,
        kv_cache: KVCache,
        tp: TensorParallel,
        max_num_seqs: int,
    ) -> None:
        self._model, self._kv_cache, self._tp = model, kv_cache, tp
        self._device = kv_cache.blocks.device
        self._graphs: DecodeGraphs | None = None
        self._slots = SamplingSlots(max_num_seqs, self._device)
        self._gpu_sampler: GpuSampler | None = None
        if self._device.type == "cuda":
            from serve.sampling.gpu_sampler import GpuSampler

            self._gpu_sampler = GpuSampler(self._slots)
        self.sampled = torch.zeros(max_num_seqs, dtype=torch.int64, device=self._device)

    def report_layers(self, report: Callable[[], None]) -> None:
        """On a CPU call ``report`` before each module of the model, because a step may take long.

        On a GPU a step is issued in milliseconds, and a graph has no modules.
        """
        if self._device.type == "cpu":
            for module in self._model.modules():
                module.register_forward_pre_hook(lambda module, args: report())

    def use_graphs(self, graphs: DecodeGraphs) -> None:
        """Run decode steps on ``graphs``, which write their ids to ``sampled``."""
        self._graphs = graphs

    @torch.inference_mode()
    def run(self, step: Step) -> Tensor | None:
        """Compute ``step``.

        Returns the sampled ids on the leader (``[num_rows]``, int64, valid until the next step) and
        None on followers.
        """
        num_rows = sum(sequence.sample for sequence in step.sequences)
        tokens = self.sampled[:num_rows]
        placed = self._slots.place(step.rows)
        if self._graphs is not None and self._graphs.holds(step):
            logits = self._graphs.run(step, placed)
            if logits is not None and self._gpu_sampler is not None:
                input_ids = self._graphs.token_ids
                self._gpu_sampler.sample_special(logits, placed, input_ids, tokens)
        else:
            logits = self._run_eagerly(step, placed, tokens)
        self._tp.broadcast(tokens)
        return None if logits is None else tokens

    def _run_eagerly(self, step: Step, placed: PlacedRows, tokens: Tensor) -> Tensor | None:
        block_size = self._kv_cache.layout.block_size
        batch = build_forward_batch(step, block_size, self._device, self.sampled)
        logits: Tensor | None = self._model(batch, self._kv_cache)  # [num_rows, vocab_size]
        if logits is not None and len(logits):
            input_ids = batch.token_ids[batch.sample_indices]
            self._sample(logits, placed, input_ids, tokens)
        return logits

    def _sample(
        self, logits: Tensor, placed: PlacedRows, input_ids: Tensor, tokens: Tensor
    ) -> None:
        if self._gpu_sampler is not None:
            self._gpu_sampler.sample(logits, placed, input_ids, tokens)
        else:
            tokens.copy_(sample(logits.float(), placed, input_ids, self._slots))
