"""Checkpoint and adapters -> the checkpoint that answers as both, one tensor in memory at a time."""

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import Tensor

from graftwork.atomic import atomic_directory
from graftwork.errors import ArtifactError, CheckpointError, ConfigError, MatchError, quoted, suggest
from graftwork.models.exchange import loading
from graftwork.models.exchange.places import Places
from graftwork.models.merging.changes import Changes, changes_of
from graftwork.models.merging.proved import Written, prove
from graftwork.models.merging.source import Source, opened
from graftwork.models.precision import DTYPES
from graftwork.models.weights import mapping_for, read_config
from graftwork.models.weights.export import copy_companions
from graftwork.models.weights.files import TensorFiles
from graftwork.models.weights.fingerprint import Passing
from graftwork.models.weights.load import open_checkpoint, read
from graftwork.models.weights.mapping import Rule
from graftwork.models.weights.writer import DTYPES as STORED
from graftwork.models.weights.writer import Entry, write_sharded
from graftwork.peft import PEFT
from graftwork.peft.artifact.card import (
    Section,
    base_section,
    card,
    code,
    header_of,
    loading_section,
    proof_section,
    table,
)
from graftwork.peft.artifact.directory import CARD
from graftwork.peft.artifact.proof import PROOF


@dataclass(frozen=True)
class Part:
    """One tensor of ours that is to be written: its rule, and the dtype of what it becomes."""

    rule: Rule
    dtype: torch.dtype

    @property
    def entries(self) -> list[Entry]:
        """The Hugging Face tensors that it becomes."""
        return [Entry(name, shape, self.dtype) for name, shape in zip(self.rule.hf, self.rule.op.shapes)]


def merge_directory(
    adapter: str | Path,
    output: str | Path,
    base: str | Path | None = None,
    names: Sequence[str] | None = None,
    dtype: str | None = None,
    check_base: bool = True,
    verify: bool = True,
) -> Path:
    """Write the base with the named adapters (default all) of a directory folded in, as a Hugging Face checkpoint.

    ``base``: the checkpoint, default the one that the adapter names; ``dtype``: of the result, default the base's. The
    weights are changed in fp32 and cast last, as ``merge_adapters`` does; no model is built, and one tensor of the base
    is in memory at a time. The base is not touched. ``verify``: before ``output`` is there, what was written answers a
    small batch as base and adapters do, a layer of either in memory at a time, and carries that as a proof. Raises
    MatchError for an adapter that is no change of weights, ArtifactError for one that cannot be read, belongs to
    another base, when the two differ or ``output`` holds anything, CheckpointError when the base cannot be read, a
    value would not be finite or the disk is full; then there is no ``output``.
    """
    wanted = known_dtype(dtype)
    check_place(Path(output))
    with opened(adapter, base, names, check_base) as source:
        write_merged(source, changes_of(source), Path(output), wanted, verify)
    return Path(output)


def write_merged(source: Source, changes: Changes, output: Path, dtype: torch.dtype | None, verify: bool) -> None:
    """Write the base of a source, changed; ``dtype`` None is each tensor's own; ``verify``: if the proof holds."""
    base = source.directory
    assert base is not None, "a source that was opened alone has no weights"
    mapping = mapping_for(source.shape, tensor_parallel=1)
    with open_checkpoint(mapping, base) as files:
        parts = [Part(rule, dtype or _stored(rule, files)) for rule in mapping.expanded() if not rule.alias]
        parts.sort(key=lambda part: -part.dtype.itemsize)  # the order that the file format needs
        entries = [entry for part in parts for entry in part.entries]
        try:
            with atomic_directory(output) as temporary:
                tensors = _tensors(parts, files, changes)
                printed = Passing() if verify else None
                passing = tensors if printed is None else _printed(entries, tensors, printed)
                write_sharded(temporary, entries, passing, _shard_bytes(files, entries))
                _write_config(temporary, base, dtype)
                copy_companions(base, temporary)
                if printed is not None:
                    narrow = any(part.dtype.itemsize < torch.float32.itemsize for part in parts)
                    written = Written(temporary, printed.value, set(changes.replaced), _rounded(changes, dtype, narrow))
                    _keep(prove(source, written), temporary)
                text = _card(source, temporary, output.resolve().name)
                (temporary / CARD).write_text(text, encoding="utf-8")
        except (OSError, SafetensorError) as error:
            reason = quoted(getattr(error, "strerror", None) or str(error), bare=True)
            raise CheckpointError(f"The merged model was not written to {quoted(output)}: {reason}.") from error


def _rounded(changes: Changes, dtype: torch.dtype | None, narrow: bool) -> Callable[[str], bool]:
    """Return what tells of a tensor of ours whether it was rounded to less than fp32 when it was written."""
    return lambda core: narrow and (dtype is not None or bool(changes.touched(core)))


def _keep(proof: str | None, directory: Path) -> None:
    if proof is not None:
        (directory / PROOF).write_text(proof)


def _card(source: Source, directory: Path, place: str) -> str:
    proof = (directory / PROOF).read_text() if (directory / PROOF).is_file() else None
    base, methods = source.base, sorted({type(transform).__name__.lower() for transform in source.transforms})
    rows = [[code(one.name), code(_brief(one), 1000)] for one in source.transforms]
    seq2seq = Places(source.shape).seq2seq
    return card(
        header_of(base.name, "transformers", ["merged", *methods], seq2seq, "finetune"),
        f"{code(base.name)} with {code(' + '.join(transform.name for transform in source.transforms))}",
        [
            base_section(base.name, base.family, base.fingerprint),
            Section("Folded in", f"Inner to outer.\n\n{table(['adapter', 'method'], rows)}"),
            proof_section(proof),
            loading_section(loading.merged(place, seq2seq)),
        ],
    )


def _printed(entries: Sequence[Entry], tensors: Iterator[Tensor], printed: Passing) -> Iterator[Tensor]:
    for entry, tensor in zip(entries, tensors):
        printed.note(entry.name, tensor, STORED[entry.dtype])
        yield tensor


def _tensors(parts: Sequence[Part], files: TensorFiles, changes: Changes) -> Iterator[Tensor]:
    """Yield every Hugging Face tensor; what no adapter changes passes as it is stored."""
    for part in parts:
        rule, who = part.rule, changes.touched(part.rule.core)
        if who:
            full = changes.applied(rule.core, read(rule, files, 0, 1), part.dtype)
            if not full.isfinite().all():
                raise MatchError(f"{who[0]} cannot be merged: {rule.core} would hold NaN or Inf.")
            yield from rule.op.write(full)
            continue
        for name in rule.hf:
            tensor = files.source(name)[:].to(part.dtype)
            if not tensor.isfinite().all():
                raise CheckpointError(
                    f"the base's weights in {quoted(files.directory)} are NaN or infinite in {name}, or would be in "
                    f"{str(part.dtype).removeprefix('torch.')}; get the checkpoint anew, or choose another dtype."
                )
            yield tensor


def _stored(rule: Rule, files: TensorFiles) -> torch.dtype:
    """Return the widest dtype of the Hugging Face tensors of a rule."""
    formats = {name: dtype for dtype, name in STORED.items()}
    return max((formats[files.source(name).get_dtype()] for name in rule.hf), key=lambda dtype: dtype.itemsize)


def _shard_bytes(files: TensorFiles, entries: Sequence[Entry]) -> int:
    """Return the size of the largest file where the base has several, else of everything."""
    sizes = [file.stat().st_size for file in set(files.files.values())]
    return max(sizes) if len(sizes) > 1 else sum(entry.size for entry in entries)


def _write_config(target: Path, base: Path, dtype: torch.dtype | None) -> None:
    config = read_config(base)
    if dtype is not None:
        named = [field for field in ("dtype", "torch_dtype") if field in config]
        config |= dict.fromkeys(named or ["torch_dtype"], str(dtype).removeprefix("torch."))
    (target / "config.json").write_text(json.dumps(config, indent=2) + "\n")


def known_dtype(name: str | None) -> torch.dtype | None:
    """Return the dtype of a name, None for none; raises ConfigError for another name."""
    if name is not None and name not in DTYPES:
        raise ConfigError(f"dtype is {quoted(name)}; {suggest(name, DTYPES)}")
    return None if name is None else DTYPES[name]


def check_place(output: Path) -> None:
    """Refuse to replace anything: a whole directory would be lost, and may be the base."""
    if output.exists() and not (output.is_dir() and not any(output.iterdir())):
        raise ArtifactError(f"{quoted(output)} is there already; name a new directory for the merged model.")


def _brief(transform: PEFT) -> str:
    """Return a method with what is set of it."""
    settings = ", ".join(f"{k}={v!r}" for k, v in transform.hyperparameters().items() if v is not None)
    return f"{type(transform).__name__}({settings})"
