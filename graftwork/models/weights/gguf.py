"""GGUF file (llama architecture) -> Hugging Face checkpoint directory, dequantised tensor by tensor."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from graftwork.atomic import atomic_directory
from graftwork.errors import CheckpointError
from graftwork.models.shape import Shape
from graftwork.models.weights.gguf_tokenizer import write_tokenizer
from graftwork.models.weights.hf import hf_config, mapping_for
from graftwork.models.weights.hf.llama import Llama
from graftwork.models.weights.hf.rope import LLAMA3
from graftwork.models.weights.writer import Entry, write_sharded

SHARD_BYTES = 4 * 2**30
ARCHITECTURE = "llama"
"""GGUF's own name of the one architecture whose tensor names are below; it holds models of the family Llama."""
_TOP = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
_BLOCK = {
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


class Field(Protocol):
    """One metadata entry of a GGUF file."""

    def contents(self) -> object:
        """Return its value: a number, a string or a list."""
        ...


class StoredTensor(Protocol):
    """One tensor of a GGUF file, quantised or not."""

    name: str
    shape: NDArray[np.uint32]
    data: NDArray[np.float32]
    tensor_type: object


class Reader(Protocol):
    """What gguf's reader gives: a mapped file's metadata and tensors."""

    fields: Mapping[str, Field]
    tensors: list[StoredTensor]


def convert(path: Path, directory: Path, dtype: torch.dtype = torch.bfloat16) -> None:
    """Write ``path`` as a Hugging Face directory in ``dtype``, whole or not at all; peak memory is one tensor.

    Raises CheckpointError for a file that is damaged, of another architecture, or lacks tensors.
    """
    reader = _open(path)
    shape = read_shape(reader)
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    wanted = mapping_for(shape, tensor_parallel=1).hf_shapes()
    missing = sorted(name for name in map(gguf_name, wanted) if name not in tensors)
    if missing:
        raise CheckpointError(f"{str(path)!r} lacks the tensors {', '.join(missing[:5])}.")
    entries = [Entry(name, size, dtype) for name, size in wanted.items()]
    with atomic_directory(directory) as temporary:
        write_sharded(temporary, entries, _tensors(wanted, tensors, shape, dtype), SHARD_BYTES)
        config = {**hf_config(shape), **_token_ids(reader), "torch_dtype": str(dtype).removeprefix("torch.")}
        (temporary / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        write_tokenizer({name: field(reader, name) for name in reader.fields if "tokenizer." in name}, temporary)


def read_shape(reader: Reader) -> Shape:
    """Return the Shape that the file's metadata describe."""
    architecture = field(reader, "general.architecture")
    if architecture != ARCHITECTURE:
        raise CheckpointError(f"GGUF architecture {architecture!r} is not supported; valid: {ARCHITECTURE!r}.")

    def get(name: str, default: object = None) -> Any:
        return field(reader, f"{ARCHITECTURE}.{name}", default)

    heads = get("attention.head_count")
    names = {tensor.name: tensor for tensor in reader.tensors}
    return Shape(
        family=Llama.name,
        num_layers=get("block_count"),
        hidden_size=get("embedding_length"),
        ffn_hidden_size=get("feed_forward_length"),
        num_attention_heads=heads,
        num_query_groups=get("attention.head_count_kv", heads),
        kv_channels=get("attention.key_length"),
        vocab_size=int(names["token_embd.weight"].shape[1]),
        max_position_embeddings=get("context_length"),
        layernorm_epsilon=_short(get("attention.layer_norm_rms_epsilon", 1e-5)),
        rotary_base=_short(get("rope.freq_base", 10000.0)),
        rope_scaling_factor=_rope_factor(names.get("rope_freqs.weight")),
        tie_embeddings="output.weight" not in names,
    )


def field(reader: Reader, name: str, default: object = None) -> Any:
    """Return one metadata value, ``default`` when the file does not have it."""
    entry = reader.fields.get(name)
    return default if entry is None else entry.contents()


def gguf_name(hf_name: str) -> str:
    """Return the GGUF name of a Hugging Face LLaMA tensor."""
    stem, kind = hf_name.rsplit(".", 1)
    if stem in _TOP:
        return f"{_TOP[stem]}.{kind}"
    _, _, layer, rest = stem.split(".", 3)
    return f"blk.{layer}.{_BLOCK[rest]}.{kind}"


def unpermuted(weight: Tensor, heads: int) -> Tensor:
    """Undo llama.cpp's reordering of q and k rows (pairs of rotary channels side by side) to halves, as in HF."""
    rows = weight.shape[0]
    return weight.view(heads, rows // heads // 2, 2, *weight.shape[1:]).transpose(1, 2).reshape(weight.shape)


def _tensors(
    wanted: dict[str, tuple[int, ...]], tensors: dict[str, StoredTensor], shape: Shape, dtype: torch.dtype
) -> Iterator[Tensor]:
    from gguf import dequantize

    heads = {"q_proj": shape.num_attention_heads, "k_proj": shape.groups}
    for name, size in wanted.items():
        stored = tensors[gguf_name(name)]
        weight = torch.from_numpy(dequantize(stored.data, stored.tensor_type).copy()).view(size)
        part = name.split(".")[-2]
        yield (unpermuted(weight, heads[part]) if part in heads else weight).to(dtype)


def _open(path: Path) -> Reader:
    from gguf import GGUFReader

    try:
        reader: Reader = GGUFReader(path)
        return reader
    except (ValueError, OSError, IndexError, KeyError) as error:
        raise CheckpointError(f"{str(path)!r} is no readable GGUF file: {error}.") from error


def _token_ids(reader: Reader) -> dict[str, int]:
    ids = {name: field(reader, f"tokenizer.ggml.{name}_token_id") for name in ("bos", "eos", "padding")}
    named = {"bos_token_id": ids["bos"], "eos_token_id": ids["eos"], "pad_token_id": ids["padding"]}
    return {name: int(value) for name, value in named.items() if value is not None}


def _rope_factor(frequencies: StoredTensor | None) -> float | None:
    """LLaMA 3.1 files store the divisor of each rotary frequency; the largest is the scaling factor."""
    if frequencies is None:
        return None
    factor = round(float(frequencies.data.max()), 4)
    return factor if factor > LLAMA3["low_freq_factor"] else None


def _short(value: float) -> float:
    """The shortest decimal that is this fp32 number: 1e-5, not 9.999999747378752e-06."""
    return float(f"{value:.7g}")
