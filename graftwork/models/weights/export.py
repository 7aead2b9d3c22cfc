"""megatron-core module -> Hugging Face checkpoint directory, written whole or not at all."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

from torch import Tensor

from graftwork.atomic import atomic_directory
from graftwork.errors import CheckpointError, GraftworkError
from graftwork.models.shape import Shape
from graftwork.models.weights.gather import Gatherer, Located
from graftwork.models.weights.hf import hf_config, mapping_for, read_config
from graftwork.models.weights.load import Modules
from graftwork.models.weights.writer import Entry, write_sharded
from graftwork.parallel.collective import agree, world_rank

SHARD_BYTES = 4 * 2**30
COPIED = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "spiece.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "vocab.json",
    "merges.txt",
    "generation_config.json",
)
"""Files that go with the weights unchanged."""
KEPT = ("bos_token_id", "eos_token_id", "pad_token_id", "initializer_range")
"""Fields of config.json that no Shape holds."""


def export_weights(
    module: Modules,
    shape: Shape,
    directory: str | Path,
    source: str | Path | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Write the base weights of ``module`` as a Hugging Face directory; collective over all ranks, rank 0 writes.

    ``source``: checkpoint directory whose tokenizer files and token ids are taken over. Peak memory is one tensor.
    Raises CheckpointError, on every rank, when the directory cannot be written.
    """
    failure: CheckpointError | None = None
    if Gatherer.takes_part():
        gatherer = Gatherer(module, mapping_for(shape))
        tensors = gatherer.tensors()
        try:
            if world_rank() == 0:
                _write(gatherer, tensors, shape, Path(directory), source, shard_bytes)
        except (GraftworkError, OSError) as error:
            failure = CheckpointError(str(error))
        # Ranks that do not write, and rank 0 after a failure, still take part in every exchange.
        for _ in tensors:
            pass
    agree(failure)


def _write(
    gatherer: Gatherer,
    tensors: Iterator[tuple[Located, Tensor | None]],
    shape: Shape,
    directory: Path,
    source: str | Path | None,
    shard_bytes: int,
) -> None:
    entries = [
        Entry(name, hf_shape, located.dtype)
        for located in gatherer.located
        for name, hf_shape in zip(located.rule.hf, located.rule.op.shapes)
    ]
    with atomic_directory(directory) as temporary:
        write_sharded(temporary, entries, _hf_tensors(tensors), shard_bytes)
        _write_config(temporary, shape, entries, source)
        if source is not None:
            copy_companions(Path(source), temporary)


def copy_companions(source: Path, target: Path) -> None:
    """Copy the files of a checkpoint that go with its weights unchanged: tokenizer, chat template, generation."""
    for name in COPIED:
        if (source / name).is_file():
            shutil.copy(source / name, target / name)


def _hf_tensors(tensors: Iterator[tuple[Located, Tensor | None]]) -> Iterator[Tensor]:
    for located, full in tensors:
        if full is not None:
            yield from located.rule.op.write(full)


def _write_config(directory: Path, shape: Shape, entries: list[Entry], source: str | Path | None) -> None:
    given = {} if source is None else read_config(source)
    kept = {name: given[name] for name in KEPT if name in given}
    dtype = str(entries[0].dtype).removeprefix("torch.")
    config = {**kept, **hf_config(shape), "torch_dtype": dtype}
    (directory / "config.json").write_text(json.dumps(config, indent=2) + "\n")
