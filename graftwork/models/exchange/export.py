"""Adapters of ours -> Hugging Face PEFT directories, from a model in any layout or from an artifact without one."""

import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from itertools import combinations
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from graftwork.errors import ArtifactError, CheckpointError, ConfigError, quoted, suggest
from graftwork.models.exchange import experts, loading, low_rank, prompts, scales, serving
from graftwork.models.exchange.lazy import Held, Readable
from graftwork.models.exchange.piece import Piece, Staged, staged
from graftwork.models.exchange.places import Places
from graftwork.models.exchange.sharing import spread
from graftwork.models.shape import Shape
from graftwork.models.weights import family_named
from graftwork.parallel.collective import agreed
from graftwork.peft import PEFT
from graftwork.peft.artifact.card import Section, card, code, header_of, loading_section, proof_section
from graftwork.peft.artifact.config import BaseEntry
from graftwork.peft.artifact.directory import CARD
from graftwork.peft.artifact.proof import PROOF
from graftwork.peft.artifact.tensors import bring_together
from graftwork.peft.methods import IA3, CanonicalAdapter, CanonicalLoRA, DoRA, LoRA, PromptTuning, PTuning, Selective
from graftwork.peft.methods.prompt_table import PromptMethod
from graftwork.peft.stack import Stack

log = logging.getLogger(__name__)

FORMATS = ("peft",)
SERVERS = ("peft", "vllm")
FORMS = ("parameters", "modules")
MERGES = "merge it (merge_adapters, export_hf), or serve it here"
COUNTERPARTS = {
    CanonicalAdapter: "Hugging Face PEFT has no bottleneck adapters; serve it here",
    Selective: f"it holds tensors of the base itself, which Hugging Face PEFT would keep as whole copies; {MERGES}",
}
"""Methods that have no counterpart, with what to do instead."""
EXPORTED = (LoRA, CanonicalLoRA, DoRA, IA3, PromptTuning, PTuning)
"""Methods that have one."""


@dataclass(frozen=True)
class Wanted:
    """What to export: format and reader, whose names these are, and the Hugging Face name of the base.

    ``experts``: how a mixture's experts are named, as ``parameters`` that hold them all (transformers 5) or as
    ``modules`` one by one (transformers 4, vLLM); None: as the reader has them.
    """

    format: str = "peft"
    for_: str = "peft"
    names: Sequence[str] | None = None
    base: str | None = None
    experts: str | None = None

    def __post_init__(self) -> None:
        named_values = (("format", self.format, FORMATS), ("for_", self.for_, SERVERS), ("experts", self.form, FORMS))
        for field, value, valid in named_values:
            if value not in valid:
                raise ConfigError(f"{field} is {quoted(value)}; {suggest(str(value), valid)}")
        if self.for_ == "vllm" and self.form == "parameters":
            raise ConfigError(
                "experts='parameters' cannot be served by vLLM, which reads experts one by one; 'modules' is valid."
            )

    @property
    def form(self) -> str:
        """How experts are named."""
        return self.experts or ("modules" if self.for_ == "vllm" else "parameters")


Prove = Callable[[Staged | None], Mapping[str, str]]
"""Takes what was written (on the first rank), on every rank; returns proofs by the names of pieces."""


def export_stack(
    stack: Stack,
    shape: Shape,
    path: str | Path,
    wanted: Wanted,
    bos: Callable[[], bool | None],
    prove: Prove | None = None,
) -> Path:
    """Write the named adapters of a model (default all), from every rank together.

    One adapter becomes the directory ``path``, several one directory each inside of it, and so do the tasks of a
    prompt. ``bos`` tells whether the tokenizer puts BOS in front of a row; ``prove`` sees what was written before
    anybody else does. Raises what it raises and, on every rank, MatchError for an unknown name, ConfigError for what
    has no exact counterpart, ArtifactError or CheckpointError when it cannot be written.
    """
    asked = set(stack.known(wanted.names))
    chosen = [transform for name, transform in stack.transforms.items() if name in asked]
    places = agreed(lambda: checked(chosen, shape, wanted))
    tensors = bring_together(stack, [transform.name for transform in chosen])
    formats = with_bos(chosen, stack.prompt_formats, bos)

    def explain(problem: Exception) -> CheckpointError:
        return CheckpointError(f"The adapter was not exported to {quoted(path)}: {quoted(str(problem), bare=True)}.")

    def put() -> Staged | None:
        if tensors is None:
            return None
        warn_of_company(chosen, tensors)
        return held.enter_context(staged(Path(path), pieces_of(chosen, places, shape, tensors, formats, wanted)))

    together = partial(agreed, catch=(OSError, SafetensorError), explain=explain)
    with ExitStack() as held:
        written = together(put)
        proofs = {} if prove is None else prove(written)
        together(lambda: None if written is None else finish(written, proofs, Path(path).resolve(), wanted))
        together(held.close)
    return Path(path)


def finish(written: Staged, proofs: Mapping[str, str], path: Path, wanted: Wanted) -> None:
    """Put beside each piece its proof, by its name, and its card; ``path``: what the export will be called."""
    for piece in written.pieces:
        directory, proof = written.directory / piece.place, proofs.get(piece.name)
        if proof is not None:
            (directory / PROOF).write_text(proof)
        place = f"{path.name}/{piece.place}".rstrip("/")
        (directory / CARD).write_text(_card(piece, proof, place, wanted), encoding="utf-8")


def _card(piece: Piece, proof: str | None, place: str, wanted: Wanted) -> str:
    base, kind = wanted.base or loading.RANDOM, str(piece.config["peft_type"])
    left = {k: v for k, v in piece.config.items() if k not in ("base_model_name_or_path", "peft_type", "task_type")}
    options = ", ".join(f"{key}={value!r}" for key, value in sorted(left.items()) if value not in (None, False, {}, ""))
    seq2seq = piece.config["task_type"] == "SEQ_2_SEQ_LM"
    return card(
        header_of(base, "peft", ["peft", kind.lower()], seq2seq, "adapter"),
        f"Adapter {code(piece.name)} for {code(base)}",
        [
            Section("Stack", f"{code(kind)} of Hugging Face PEFT: {code(options, 1000)}."),
            proof_section(proof),
            loading_section(loading.exported(piece.config, base, place, piece.adapter, wanted.for_)),
        ],
    )


def warn_of_company(chosen: Sequence[PEFT], tensors: Mapping[str, Readable]) -> None:
    """Warn when adapters stand at the same modules: each directory is one of them, and not what they do together."""
    sites: dict[str, set[str]] = {transform.name: set() for transform in chosen}
    for key in tensors:
        name, _, rest = key.partition(".")
        if name in sites:
            sites[name].add(rest.rpartition(".")[0])
    for first, second in combinations(sites, 2):
        if shared := sites[first] & sites[second]:
            log.warning(
                "Adapters %r and %r stand at the same modules, such as %s; each is exported alone, and only here do "
                "they act one around the other.",
                first,
                second,
                min(shared),
            )


def checked(chosen: Sequence[PEFT], shape: Shape, wanted: Wanted) -> Places:
    """Return where the linears are, once everything that can be refused without a tensor is known to be fine."""
    if not chosen:
        raise ArtifactError("No adapter was named to be exported; leave names out for all of them.")
    places = Places(shape)
    if wanted.experts is not None and not places.experts:
        raise ConfigError(f"experts={wanted.experts!r} counts only for a mixture of experts; leave it out.")
    for transform in chosen:
        if wanted.for_ == "vllm":
            serving.refuse_unserved(transform, places)
        if type(transform) not in EXPORTED:  # what is derived from one of them may compute something else
            why = COUNTERPARTS.get(type(transform), f"Hugging Face PEFT has no such method; {MERGES}")
            raise ConfigError(f"{transform} cannot be exported: {why}.")
        if isinstance(transform, LoRA) and wanted.for_ == "peft" and transform.dropout:
            _check_dropout(transform)
    return places


def _check_dropout(transform: LoRA) -> None:
    if transform.dropout_position != "pre":
        raise ConfigError(
            f"{transform} has dropout_position={transform.dropout_position!r}, but Hugging Face PEFT drops values "
            "before A only, so that training would go on otherwise; export it with for_='vllm', where nothing trains, "
            f"or {MERGES}."
        )


def pieces_of(
    chosen: Sequence[PEFT],
    places: Places,
    shape: Shape,
    tensors: Mapping[str, Readable],
    formats: Mapping[str, Mapping[str, Any]],
    wanted: Wanted,
) -> list[Piece]:
    """Return the directories that adapters become, their tensors not made yet."""
    found = []
    for transform in chosen:
        prefix = f"{transform.name}."
        mine = {key.removeprefix(prefix): tensor for key, tensor in tensors.items() if key.startswith(prefix)}
        held = Held(spread(mine, places), f"Adapter {transform.name!r}")
        if isinstance(transform, LoRA):
            found.append(_low_rank(transform, places, held, wanted))
        elif isinstance(transform, IA3):
            vectors = scales.vectors_of(transform, places, held)
            if wanted.form == "parameters":
                experts.check_scales(transform, places, vectors)
            config = scales.config_of(transform, places, vectors, wanted.base)
            found.append(Piece(transform.name, config, scales.keyed(vectors)))
        elif isinstance(transform, PromptMethod):
            prompts.check_placement(transform, places, formats.get(transform.name, {}).get("add_bos"))
            found += _prompts(transform, places, shape, held, wanted)
    return [replace(found[0], alone=True)] if len(found) == 1 else found


def _low_rank(transform: LoRA, places: Places, held: Held, wanted: Wanted) -> Piece:
    pairs = low_rank.pairs_of(transform, places, held)
    served = wanted.for_ == "vllm"
    if served:
        pairs = serving.padded(transform, places, pairs)
    elif wanted.form == "parameters":
        pairs = experts.as_parameters(transform, places, pairs)
    config = low_rank.config_of(transform, places, pairs, wanted.base)
    if served:
        config = {field: config[field] for field in serving.FIELDS}
    return Piece(transform.name, config, {key: lazy for pair in pairs for key, lazy in pair.tensors().items()})


def _prompts(transform: PromptMethod, places: Places, shape: Shape, held: Held, wanted: Wanted) -> list[Piece]:
    return [
        Piece(
            f"{transform.name}/{task}".rstrip("/"),
            prompts.config_of(places, shape, table.shape[0], wanted.base),
            prompts.keyed(table, places),
        )
        for task, table in prompts.tables_of(transform, shape, held).items()
    ]


def with_bos(
    chosen: Sequence[PEFT], known: Mapping[str, Mapping[str, Any]], bos: Callable[[], bool | None]
) -> dict[str, Mapping[str, Any]]:
    """Return prompt formats that say whether rows have BOS, also where the data left it to the tokenizer."""
    found = {t.name: known.get(t.name, {}) for t in chosen if isinstance(t, PromptMethod)}
    return {
        name: given if given.get("add_bos") is not None else {**given, "add_bos": bos()}
        for name, given in found.items()
    }


def shape_of(base: BaseEntry, who: str) -> Shape:
    """Return the shape of the base that an artifact remembers; raises ArtifactError for one that is unknown here."""
    fields: dict[str, Any] = dict(base.shape)  # checked by the shape itself
    try:
        return family_named(base.family).shape_class(**fields)
    except TypeError as error:
        reason = quoted(str(error), bare=True)
        raise ArtifactError(f"Adapter {who} describes no base of this version: {reason}.") from error
