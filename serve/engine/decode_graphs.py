"""Decode steps as CUDA graphs: one per batch-size bucket, from embedding to token id.

A graph reads its inputs from fixed memory, which every step fills with one copy. One call launches
it. Launched one by one, the same kernels would keep the GPU waiting for Python. A batch runs on the
smallest graph that holds it, and its padding rows write no keys and values.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from serve.kv.cache import KVCache
from serve.model.forward_batch import AttentionMetadata, DecodeSplits, ForwardBatch
from serve.model.kernels.triton_decode import fill_in, slice_tables
from serve.protocol.plan import Step
from serve.sampling.placed_rows import PlacedRows
from serve.sampling.triton_sampling import sample_plain

NO_SLOT = -1  # the slot of a row whose keys and values are not stored
_WARM_UPS = 2


def batch_sizes(max_num_seqs: int) -> list[int]:
    """Return the buckets. They are dense where the number of rows determines a step's time."""
    buckets = [1, 2, 4, *range(8, 129, 8), *range(144, 513, 16), *range(544, 8193, 32)]
    return [*(size for size in buckets if size < max_num_seqs), max_num_seqs]


def choose_num_splits(batch_size: int, num_kv_heads: int, num_sms: int) -> int:
    """Return into how many slices to cut each decode row, so that every multiprocessor has one.

    The attention kernel's unit of work is one slice of one row and KV head.
    """
    return max(1, num_sms // (batch_size * num_kv_heads))


@dataclass(frozen=True, slots=True)
class Inputs:
    """Inputs of ``size`` rows as views of one buffer, with the same layout on host and device.

    ``blocks`` is the rest of the buffer. It holds the block tables one after another; the table of
    row ``i`` starts at ``offsets[i]``.
    """

    token_ids: Tensor  # [size], int64
    positions: Tensor  # [size], int64
    slots: Tensor  # [size], int64
    streams: Tensor  # [size], int64
    temperatures: Tensor  # [size], float32
    lengths: Tensor  # [size], int32
    offsets: Tensor  # [size], int32
    blocks: Tensor  # [num_blocks], int32

    @classmethod
    def over(cls, buffer: Tensor, size: int) -> Inputs:
        """Divide ``buffer`` (int32) into views. The int64 columns come first, so that all align."""
        int64s = buffer[: 8 * size].view(torch.int64).view(4, size)
        int32s = buffer[8 * size : 11 * size].view(3, size)
        temperatures = int32s[0].view(torch.float32)
        ids = int64s[0], int64s[1], int64s[2], int64s[3]
        return cls(*ids, temperatures, int32s[1], int32s[2], buffer[11 * size :])

    @staticmethod
    def num_words(size: int, num_blocks: int) -> int:
        """Return the length of the buffer."""
        return 11 * size + num_blocks


class DecodeGraphs:
    """The graphs of one rank. They are captured and launched in the GPU thread."""

    def __init__(
        self,
        model: nn.Module,
        kv_cache: KVCache,
        sampled: Tensor,
        max_model_len: int,
        *,
        has_windows: bool = False,
    ) -> None:
        """Allocate the input buffer; ``capture`` makes the graphs.

        Steps write their token ids to ``sampled``: int64, one for each row of the largest batch.
        ``has_windows``: some layers attend to a window only, and do not split rows.
        """
        self._has_windows = has_windows
        self._model, self._kv_cache, self._sampled = model, kv_cache, sampled
        max_num_seqs = len(sampled)
        self._block_size = kv_cache.layout.block_size
        device = kv_cache.blocks.device
        self._width = kv_cache.layout.num_blocks_for(max_model_len)
        num_words = Inputs.num_words(max_num_seqs, max_num_seqs * self._width)
        self._buffer = torch.zeros(num_words, dtype=torch.int32, device=device)
        self._num_sms = torch.cuda.get_device_properties(device).multi_processor_count
        # flash-attn 2, which older GPUs use, splits rows by itself.
        self._splits = torch.cuda.get_device_capability(device)[0] >= 9
        self._sizes = batch_sizes(max_num_seqs)
        # Splitting never makes more rows than there are multiprocessors.
        max_rows = max(max_num_seqs, self._num_sms)
        self._numbers = torch.arange(max_rows + 1, device=device, dtype=torch.int32)
        self.token_ids = torch.zeros_like(sampled)  # input of the last step, one for each row
        self._graphs: dict[int, torch.cuda.CUDAGraph] = {}
        self._logits: Tensor | None = None  # [max_num_seqs, vocab_size], on the leader
        self._pool: Any = None
        # One stream for all captures, because torch keeps a cuBLAS workspace for every stream.
        self._side_stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]

    def capture(
        self, progress: Callable[[int, int], None], sizes: Collection[int] | None = None
    ) -> None:
        """Capture all graphs, or those of ``sizes``.

        The largest comes first, because the others fit into its memory.
        """
        selected = [size for size in self._sizes if sizes is None or size in sizes]
        for done, size in enumerate(reversed(selected), 1):
            self._capture(size)
            progress(done, len(selected))

    def measure_bytes(self) -> int:
        """Estimate the device memory of ``capture`` from the largest and the smallest graph."""
        graph_bytes = []
        for size in (self._sizes[-1], self._sizes[0]):
            free_bytes = torch.cuda.mem_get_info()[0]
            self._capture(size)
            torch.cuda.synchronize()
            graph_bytes.append(free_bytes - torch.cuda.mem_get_info()[0])
        return max(0, graph_bytes[0]) + max(0, graph_bytes[1]) * (len(self._sizes) - 1)

    @torch.inference_mode()
    def _capture(self, size: int) -> None:
        inputs = Inputs.over(self._buffer, size)
        self._buffer.zero_()
        inputs.slots.fill_(NO_SLOT)
        stream = self._side_stream
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(_WARM_UPS):
                self._forward(inputs, size)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        # thread_local, because waiter threads may wait for events during the capture.
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            self._forward(inputs, size)
        self._pool = graph.pool()
        self._graphs[size] = graph

    def _forward(self, inputs: Inputs, size: int) -> None:
        token_ids = fill_in(inputs.token_ids, self._sampled, self.token_ids[:size])
        batch = ForwardBatch(token_ids, inputs.positions, self._metadata(inputs, size), None)
        logits: Tensor | None = self._model(batch, self._kv_cache)
        if logits is not None:
            sampled = self._sampled[:size]
            sample_plain(logits, inputs.temperatures, inputs.streams, sampled)
            self._store_logits(logits)

    def _store_logits(self, logits: Tensor) -> None:
        """Copy ``logits`` to memory that all graphs share. It holds one step's at a time."""
        if self._logits is None:  # in the warm-up, not in a capture
            self._logits = logits.new_empty(len(self._sampled), logits.shape[1])
        self._logits[: len(logits)].copy_(logits)

    def _metadata(self, inputs: Inputs, size: int) -> AttentionMetadata:
        num_kv_heads = len(self._kv_cache.layout.kv_heads)
        count = choose_num_splits(size, num_kv_heads, self._num_sms) if self._splits else 1
        tables, lengths = self._slice(inputs, count)
        numbers = self._numbers[: count * size + 1]
        splits = DecodeSplits(count, numbers, lengths, tables) if count > 1 else None
        if splits is not None and self._has_windows:
            tables, lengths = self._slice(inputs, 1)
        return AttentionMetadata(
            cu_seqlens_q=numbers,
            seqlens_k=lengths,
            max_seqlen_q=1,
            max_seqlen_k=tables.shape[1] * self._block_size,
            block_tables=tables,
            slot_mapping=inputs.slots,
            query_lengths=(1,) * size,
            key_lengths=(),  # the kernels in a graph do not read lengths on the host
            num_decodes=size,
            splits=splits,
        )

    def _slice(self, inputs: Inputs, count: int) -> tuple[Tensor, Tensor]:
        return slice_tables(
            inputs.blocks, inputs.offsets, inputs.lengths, count, self._width, self._block_size
        )

    def holds(self, step: Step) -> bool:
        """Return whether ``step`` has decode rows only, all of them sampled, and not too many."""
        return len(step.sequences) <= self._sizes[-1] and all(
            len(sequence.token_ids) == 1 and sequence.sample for sequence in step.sequences
        )

    @torch.inference_mode()
    def run(self, step: Step, placed: PlacedRows) -> Tensor | None:
        """Compute ``step`` and sample its plain rows, which are ``placed`` on the leader.

        Returns the leader's logits ``[size, vocab_size]``, valid until the next step, or None on
        followers.
        """
        count = len(step.sequences)
        size = next(size for size in self._sizes if size >= count)
        self._fill(step, placed, size)
        self.replay(size)
        return None if self._logits is None else self._logits[:size]

    def replay(self, size: int) -> None:
        """Launch the graph of ``size`` rows on the current contents of its inputs."""
        self._graphs[size].replay()

    def _fill(self, step: Step, placed: PlacedRows, size: int) -> None:
        sequences, block_size = step.sequences, self._block_size
        num_blocks_for = self._kv_cache.layout.num_blocks_for
        counts = [num_blocks_for(sequence.start + 1) for sequence in sequences]
        blocks = _array(
            chain.from_iterable(s.block_table[:n] for s, n in zip(sequences, counts, strict=True)),
            np.int32,
        )
        # torch's cache gets the pinned memory back and reuses it only after the copy has run.
        host = torch.empty(Inputs.num_words(size, len(blocks)), dtype=torch.int32, pin_memory=True)
        host.zero_()
        inputs, rows = Inputs.over(host, size), len(sequences)
        positions = _array((sequence.start for sequence in sequences), np.int64)
        ends = np.cumsum(counts)
        last_blocks = blocks[ends - 1].astype(np.int64)  # hold each row's new token
        inputs.token_ids.numpy()[:rows] = _array((s.token_ids[0] for s in sequences), np.int64)
        inputs.positions.numpy()[:rows] = positions
        inputs.slots.numpy()[:rows] = last_blocks * block_size + positions % block_size
        inputs.slots.numpy()[rows:] = NO_SLOT
        inputs.lengths.numpy()[:rows] = positions + 1
        inputs.offsets.numpy()[:rows] = ends - counts
        inputs.blocks.numpy()[:] = blocks
        if step.rows:
            inputs.temperatures.numpy()[:rows] = placed.params["temperature"]
            inputs.streams.numpy()[:rows] = placed.streams()
        self._buffer[: len(host)].copy_(host, non_blocking=True)


def _array(values: Iterable[int], dtype: type[np.generic]) -> np.ndarray:
    return np.fromiter(values, dtype=dtype)
