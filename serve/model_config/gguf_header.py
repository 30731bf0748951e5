"""Translate the header of a GGUF file (llama architecture) to the keys of config.json. No torch."""

from __future__ import annotations

import functools
import struct
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gguf import GGUFReader

_LONG_ARRAY = 1024
_ARRAY_HEAD = 12  # bytes: the type and the number of items
_READ_ERRORS = (struct.error, ValueError, KeyError, IndexError, OSError, UnicodeDecodeError)
_END_TOKENS = ("eos_token_id", "eot_token_id", "eom_token_id")
_FILE_TYPES = {0: "float32", 1: "float16"}  # by llama.cpp's file type; any other: bfloat16
# Keys that change results and are not supported, each with the values that have no effect.
_NEUTRAL: dict[str, tuple[object, ...]] = {
    "expert_count": (None, 0),
    "attention.sliding_window": (None, 0),
    "attention.scale": (None, 0.0),
    "embedding_scale": (None, 0.0, 1.0),
    "residual_scale": (None, 0.0, 1.0),
    "logit_scale": (None, 0.0, 1.0),
    "rope.scale_linear": (None, 1.0),
    "rope.scaling.alpha": (None, 0.0),
    "rope.scaling.attn_factor": (None, 1.0),
    "rope.scaling.yarn_log_multiplier": (None, 0.0),
    "rope.scaling.yarn_ext_factor": (None, 1.0),
    "rope.scaling.yarn_attn_factor": (None, 1.0),
}


def open_gguf(path: Path) -> GGUFReader:
    """Memory-map the file. Raises ``ValueError`` with one line if it is not a GGUF file."""
    if not path.is_file():
        raise ValueError("the file does not exist")
    try:
        return _reader_class()(str(path))
    except _READ_ERRORS as error:
        raise ValueError(f"not a readable GGUF file: {error}") from None


@functools.cache
def _reader_class() -> type[GGUFReader]:
    """Return a reader that skips long arrays, which are the tokenizer's.

    The package makes several objects for each token of the vocabulary, which takes seconds. It is
    imported late, because it is slow to import and only GGUF files need it.
    """
    import gguf

    strings, array = gguf.GGUFValueType.STRING, gguf.GGUFValueType.ARRAY

    class HeaderReader(gguf.GGUFReader):  # type: ignore[misc]
        def _get_field_parts(self, orig_offs: int, raw_type: int) -> Any:
            if raw_type == array and self.byte_order == "I":  # the machine's byte order
                kind, length = struct.unpack_from("=IQ", self.data, orig_offs)
                start = orig_offs + _ARRAY_HEAD
                item = self.gguf_scalar_to_np.get(gguf.GGUFValueType(kind))
                if length > _LONG_ARRAY and item is not None:
                    return _ARRAY_HEAD + length * item(0).nbytes, [], [], [array]
                if length > _LONG_ARRAY and kind == strings:
                    end = _end_of_strings(self.data, start, length)
                    return end - orig_offs, [], [], [array]
            return super()._get_field_parts(orig_offs, raw_type)

    return HeaderReader


def _end_of_strings(data: Any, start: int, count: int) -> int:
    unpack = struct.Struct("=Q").unpack_from
    for _ in range(count):
        start += 8 + unpack(data, start)[0]
    return start


def read_gguf_config(path: Path) -> dict[str, Any]:
    """Return the model in ``path`` as config.json. Raises ``ValueError`` if it is unsupported."""
    try:
        return gguf_config(open_gguf(path))
    except KeyError as error:
        raise ValueError(f"the GGUF header lacks {error}") from None


def gguf_config(reader: GGUFReader) -> dict[str, Any]:
    """Return an open file as config.json. Raises ``KeyError`` that names a missing header key."""
    values = {
        name: field.contents()
        for name, field in reader.fields.items()
        if not name.startswith("tokenizer.ggml.") or name.endswith("_id")
    }
    architecture = values.get("general.architecture")
    if architecture != "llama":
        raise ValueError(f"GGUF architecture {architecture!r} is not supported; supported: llama")
    if values.get("split.count", 1) > 1:
        raise ValueError("this is one part of a split GGUF file; merge the parts first")
    for key, neutral in _NEUTRAL.items():
        if values.get(f"llama.{key}") not in neutral:
            raise ValueError(f"GGUF key llama.{key} is not supported")
    return _translate(values, reader)


def _translate(values: dict[str, Any], reader: GGUFReader) -> dict[str, Any]:
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    num_heads = values["llama.attention.head_count"]
    hidden_size = values["llama.embedding_length"]
    head_dim = values.get("llama.attention.key_length", hidden_size // num_heads)
    for key in ("llama.attention.value_length", "llama.rope.dimension_count"):
        if values.get(key, head_dim) != head_dim:
            raise ValueError(f"GGUF key {key} is {values[key]}, the keys' length is {head_dim}")
    ends = [values[key] for name in _END_TOKENS if (key := f"tokenizer.ggml.{name}") in values]
    return {
        "architectures": ["LlamaForCausalLM"],
        "vocab_size": int(tensors["token_embd.weight"].shape[-1]),
        "hidden_size": hidden_size,
        "intermediate_size": values["llama.feed_forward_length"],
        "num_hidden_layers": values["llama.block_count"],
        "num_attention_heads": num_heads,
        "num_key_value_heads": values.get("llama.attention.head_count_kv", num_heads),
        "head_dim": head_dim,
        "max_position_embeddings": values["llama.context_length"],
        "rms_norm_eps": values["llama.attention.layer_norm_rms_epsilon"],
        "rope_parameters": _rope(values, tensors),
        "tie_word_embeddings": "output.weight" not in tensors,
        "attention_bias": "blk.0.attn_q.bias" in tensors,
        "attention_output_bias": "blk.0.attn_output.bias" in tensors,
        "mlp_bias": "blk.0.ffn_gate.bias" in tensors,
        "dtype": _FILE_TYPES.get(values.get("general.file_type", 0), "bfloat16"),
        "eos_token_id": ends,
    }


def _rope(values: dict[str, Any], tensors: dict[str, Any]) -> dict[str, Any]:
    """Return the rope parameters; GGUF stores llama3 scaling as one divisor per frequency."""
    rope: dict[str, Any] = {"rope_theta": values.get("llama.rope.freq_base", 10000.0)}
    kind = values.get("llama.rope.scaling.type", "none")
    if kind != "none":
        rope["rope_type"] = kind
        rope["factor"] = values["llama.rope.scaling.factor"]
    original = values.get("llama.rope.scaling.original_context_length")
    if kind == "yarn" and original is not None:
        rope["original_max_position_embeddings"] = original
        for name in ("beta_fast", "beta_slow"):
            rope[name] = values.get(f"llama.rope.scaling.yarn_{name}")
    if "rope_freqs.weight" in tensors:
        rope["frequency_factors"] = tensors["rope_freqs.weight"].data.tolist()
    return rope
