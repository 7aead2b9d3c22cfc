"""GGUF file (llama architecture) -> Hugging Face checkpoint directory, dequantised tensor by tensor."""

import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from graftwork.atomic import atomic_directory
from graftwork.errors import CheckpointError, quoted, suggest
from graftwork.models.shape import Shape
from graftwork.models.weights.gguf_header import check_header
from graftwork.models.weights.gguf_tokenizer import Vocabulary, read_vocabulary, write_tokenizer
from graftwork.models.weights.hf import hf_config, mapping_for
from graftwork.models.weights.hf.llama import Llama
from graftwork.models.weights.hf.rope import LLAMA3
from graftwork.models.weights.load import MANY
from graftwork.models.weights.writer import Entry, write_sharded

SHARD_BYTES = 4 * 2**30
ARCHITECTURE = "llama"
"""GGUF's own name of the one architecture whose tensor names are below; it holds models of the family Llama."""
_UNREADABLE = (
    ValueError,
    OSError,
    LookupError,
    TypeError,
    AttributeError,
    ArithmeticError,
    RuntimeError,
    AssertionError,
)
"""What gguf, numpy and torch raise for damaged files; sizes and counts have been compared by then."""
ROPE_FACTORS = "rope_freqs.weight"
USED = frozenset(
    {
        *("block_count", "embedding_length", "feed_forward_length", "context_length", "rope.freq_base"),
        *("attention.head_count", "attention.head_count_kv", "attention.key_length"),
        "attention.layer_norm_rms_epsilon",
    }
)
"""Settings of the architecture that ``read_shape`` reads."""
_AROUND = frozenset({"GGUF", "general", "tokenizer", "quantize", "split", "imatrix"})
"""First parts of settings that say nothing of the architecture."""
_ROOMS = _AROUND | {ARCHITECTURE}
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


def shape_of(path: Path) -> Shape:
    """Return the shape of the model in a GGUF file; raises CheckpointError for a file that is damaged or no LLaMA."""
    return described_by(path)[0]


def described_by(path: Path) -> tuple[Shape, Callable[[], Vocabulary]]:
    """Return the shape of the model in a GGUF file, and what reads the vocabulary; raises as ``shape_of`` does."""
    reader = _open(path)
    shape = read_shape(reader)
    _wanted(path, shape, {tensor.name: tensor for tensor in reader.tensors})
    return shape, lambda: _vocabulary(reader)


def convert(path: Path, directory: Path, dtype: torch.dtype = torch.bfloat16) -> None:
    """Write ``path`` as a Hugging Face directory in ``dtype``, whole or not at all; peak memory is one tensor.

    Raises CheckpointError for a file that is damaged, of another architecture, or lacks tensors.
    """
    reader = _open(path)
    shape = read_shape(reader)
    vocabulary = _vocabulary(reader)
    ids = {f"{name}_token_id": value for name, value in vocabulary.ids("bos", "eos", "pad").items()}
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    wanted = _wanted(path, shape, tensors)
    entries = [Entry(name, size, dtype) for name, size in wanted.items()]
    with atomic_directory(directory) as temporary:
        write_sharded(temporary, entries, _tensors(wanted, tensors, shape, dtype), SHARD_BYTES)
        config = {**hf_config(shape), **ids, "torch_dtype": str(dtype).removeprefix("torch.")}
        (temporary / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        write_tokenizer(vocabulary, temporary)


def _wanted(path: Path, shape: Shape, tensors: Mapping[str, StoredTensor]) -> dict[str, tuple[int, ...]]:
    """Return the Hugging Face tensors of ``shape``; raises CheckpointError unless the file holds exactly those."""
    mapping = mapping_for(shape, tensor_parallel=1)
    if mapping.count() > MANY + 2 * len(tensors):  # before their names are listed: a file may claim billions of layers
        raise CheckpointError(f"{quoted(path)} holds {len(tensors)} tensors and describes {mapping.count()}.")
    wanted = mapping.hf_shapes()
    names = {gguf_name(name): name for name in wanted}
    missing = sorted(names.keys() - tensors.keys())
    unused = sorted(tensors.keys() - names.keys() - {ROPE_FACTORS})
    wrong = sorted(n for n in names.keys() & tensors.keys() if _size(tensors[n]) != wanted[names[n]])
    for what, found in (("lacks", missing), ("has, beside those of a LLaMA,", unused), ("has in another shape", wrong)):
        if found:
            shown = ", ".join(quoted(name, bare=True) for name in found[:5])
            raise CheckpointError(f"{quoted(path)} {what} the tensors {shown}.")
    return wanted


def _vocabulary(reader: Reader) -> Vocabulary:
    return read_vocabulary({name: field(reader, name) for name in reader.fields if "tokenizer." in name})


def _size(tensor: StoredTensor) -> tuple[int, ...]:
    return tuple(int(n) for n in reversed(tensor.shape))


def _check_metadata(reader: Reader, shape: Shape) -> None:
    """Raise CheckpointError for settings of the architecture that would be read differently, or not at all."""
    fixed = {
        "attention.value_length": shape.channels,
        "rope.dimension_count": shape.channels,
        "vocab_size": shape.vocab_size,
        "rope.scaling.type": "none",
        "expert_count": 0,
        "expert_used_count": 0,
    }
    for name in reader.fields:
        room, _, own = name.partition(".")
        if room in _AROUND or (room == ARCHITECTURE and own in USED):
            continue
        if room != ARCHITECTURE:  # a setting whose name is damaged would count as absent
            raise CheckpointError(f"the setting {quoted(name)} of a GGUF file is unknown; {suggest(room, _ROOMS)}")
        if own not in fixed or field(reader, name) != fixed[own]:
            valid = f"; valid: {fixed[own]!r}" if own in fixed else ""
            raise CheckpointError(
                f"{quoted(name)}={quoted(field(reader, name))} of a GGUF file is not supported{valid}."
            )


def read_shape(reader: Reader) -> Shape:
    """Return the Shape that the file's metadata describe."""
    try:
        shape = _shape(reader)
        _check_metadata(reader, shape)
        with np.errstate(all="ignore"):
            _check_frequencies(next((t for t in reader.tensors if t.name == ROPE_FACTORS), None), shape)
    except _UNREADABLE as error:
        raise CheckpointError(
            f"the GGUF file describes no valid model: {quoted(str(error), 200, bare=True)}"
        ) from error
    return shape


def _shape(reader: Reader) -> Shape:
    architecture = field(reader, "general.architecture")
    if architecture != ARCHITECTURE:
        raise CheckpointError(f"GGUF architecture {quoted(architecture)} is not supported; valid: {ARCHITECTURE!r}.")

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
        layernorm_epsilon=_short(get("attention.layer_norm_rms_epsilon")),
        rotary_base=_short(get("rope.freq_base", 10000.0)),
        rope_scaling_factor=_rope_factor(names.get(ROPE_FACTORS)),
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
        try:
            with np.errstate(all="ignore"):
                weight = torch.from_numpy(dequantize(stored.data, stored.tensor_type).copy()).view(size)
        except _UNREADABLE as error:
            raise CheckpointError(
                f"the tensor {quoted(stored.name)} of a GGUF file cannot be read: {_said(error)}."
            ) from error
        part = name.split(".")[-2]
        yield (unpermuted(weight, heads[part]) if part in heads else weight).to(dtype)


def _open(path: Path) -> Reader:
    from gguf import GGUFReader

    check_header(path)
    try:
        with np.errstate(all="ignore"):
            reader: Reader = GGUFReader(path)
        return reader
    except _UNREADABLE as error:
        raise CheckpointError(f"{quoted(path)} is no readable GGUF file: {_said(error)}.") from error


def _said(error: Exception) -> str:
    return quoted(str(error).partition("\n")[0], bare=True).rstrip(".")


def _rope_factor(frequencies: StoredTensor | None) -> float | None:
    """LLaMA 3.1 files store the divisor of each rotary frequency; the largest is the scaling factor."""
    if frequencies is None:
        return None
    factor = round(float(frequencies.data.max()), 4)
    return factor if factor > LLAMA3["low_freq_factor"] else None


def _check_frequencies(stored: StoredTensor | None, shape: Shape) -> None:
    """Raise CheckpointError unless the divisors of the rotary frequencies are those of LLaMA 3.1's formula."""
    if stored is None:
        return
    factor, low, high = shape.rope_scaling_factor or 1.0, LLAMA3["low_freq_factor"], LLAMA3["high_freq_factor"]
    exponents = np.arange(0, shape.channels, 2) / shape.channels
    turns = LLAMA3["original_max_position_embeddings"] / (2 * np.pi * shape.rotary_base**exponents)
    smooth = np.clip((turns - low) / (high - low), 0.0, 1.0)
    expected = 1 / ((1 - smooth) / factor + smooth)
    if stored.data.shape != expected.shape or not np.allclose(stored.data, expected, rtol=1e-3):
        raise CheckpointError(f"{ROPE_FACTORS} of the GGUF file does not scale the frequencies as LLaMA 3.1 does.")


def _short(value: float) -> float:
    """The shortest decimal that is this fp32 number: 1e-5, not 9.999999747378752e-06."""
    return float(f"{value:.7g}")
