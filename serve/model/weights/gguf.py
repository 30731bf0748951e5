"""GGUFCheckpoint: the tensors of a llama GGUF file, as transformers names and orders them."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from torch import Tensor

from serve.model.layers import Shard
from serve.model_config.gguf_header import gguf_config, open_gguf

_NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_ROTATED = re.compile(r"\.(q_proj|k_proj)\.")
_IN_HEADER = "rope_freqs.weight"  # belongs to the rope config, see gguf_header
_CHUNK = 2**22  # elements dequantised at a time, to bound temporary memory


class GGUFCheckpoint:
    """A memory-mapped GGUF file. Only blocks that overlap the shard are dequantised."""

    def __init__(self, path: Path) -> None:
        try:
            reader = open_gguf(path)
            self._head_dim = int(gguf_config(reader)["head_dim"])
        except (ValueError, KeyError) as error:
            raise ValueError(f"{path}: {error}") from None
        self._path = path
        self._tensors: dict[str, Any] = {
            _translate(tensor.name): tensor
            for tensor in reader.tensors
            if tensor.name != _IN_HEADER
        }

    def names(self) -> Iterable[str]:
        return self._tensors.keys()

    def shape(self, name: str) -> tuple[int, ...]:
        # GGUF lists dimensions from the innermost to the outermost.
        return tuple(int(size) for size in reversed(self._tensors[name].shape))

    def read(self, name: str, shard: Shard) -> Tensor:
        tensor = self._tensors[name]
        rows = tensor.data if tensor.data.ndim == 2 else tensor.data[None]
        # A vector is read as one row, so its only dimension is the columns.
        by_column = shard.dim == 1 or tensor.data.ndim == 1
        out = torch.empty(shard.local_shape)
        target = out if tensor.data.ndim == 2 else out[None]
        begin = 0
        for start, stop in shard.ranges:
            end = begin + stop - start
            part = target[:, begin:end] if by_column else target[begin:end]
            columns = (start, stop) if by_column else (0, int(tensor.shape[0]))
            if start < stop:
                self._dequantise(part, rows if by_column else rows[start:stop], columns, tensor)
            begin = end
        return _unpermute(out, self._head_dim) if _ROTATED.search(name) else out

    def _dequantise(
        self, target: Tensor, rows: np.ndarray, columns: tuple[int, int], tensor: Any
    ) -> None:
        """Dequantise ``columns`` (start, stop) of ``rows`` into ``target``, in whole blocks."""
        start, stop = columns
        block, block_bytes = gguf.GGML_QUANT_SIZES[tensor.tensor_type]
        width = block_bytes // rows.itemsize  # unquantised types come as numbers, others as bytes
        first, last = start // block, -(-stop // block)
        step = max(1, _CHUNK // ((last - first) * block))
        for row in range(0, len(rows), step):
            raw = np.ascontiguousarray(rows[row : row + step, first * width : last * width])
            try:
                values = gguf.dequantize(raw, tensor.tensor_type)
            except (NotImplementedError, gguf.QuantError) as error:
                message = f"{self._path}: {tensor.name} cannot be dequantised: {error}"
                raise ValueError(message) from None
            part = values[:, start - first * block : stop - first * block]
            target[row : row + step] = torch.from_numpy(np.array(part))


def _translate(name: str) -> str:
    """Return a tensor's name in transformers; unknown ones stay, to be reported as left over."""
    match = re.fullmatch(r"(?:blk\.(\d+)\.)?(\w+)\.(weight|bias)", name)
    if match is None or match[2] not in _NAMES:
        return name
    layer = "" if match[1] is None else f"model.layers.{match[1]}."
    return f"{layer}{_NAMES[match[2]]}.{match[3]}"


def _unpermute(rows: Tensor, head_dim: int) -> Tensor:
    """Undo GGUF's order of a head's rows, in which dimension ``i`` is next to ``i + head_dim / 2``.

    ``rows`` are whole heads, ``[num_heads * head_dim, ...]``.
    """
    pairs = rows.view(-1, head_dim // 2, 2, *rows.shape[1:])
    return pairs.transpose(1, 2).flatten(0, 2)
