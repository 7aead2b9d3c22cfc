"""Cards of adapters: what the artifact says, what the training told, and the ways of loading that its methods leave."""

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from graftwork.atomic import atomic_write_text
from graftwork.errors import ArtifactError, GraftworkError
from graftwork.models.exchange import loading
from graftwork.models.exchange.export import Wanted, checked, pieces_of, shape_of
from graftwork.models.exchange.lazy import Readable
from graftwork.models.exchange.piece import Piece
from graftwork.models.shape import Shape
from graftwork.peft import PEFT
from graftwork.peft.artifact import directory as artifact
from graftwork.peft.artifact.card import Told, Way, adapter_card
from graftwork.peft.artifact.config import ArtifactConfig
from graftwork.peft.artifact.entries import prompt_formats, transforms
from graftwork.peft.artifact.proof import PROOF
from graftwork.peft.artifact.verified import stored_tensors

SERVED = {"peft": loading.PEFT, "vllm": loading.VLLM}
"""What the readers of exports are called."""


def describe(told: Told, config: ArtifactConfig, tensors: Mapping[str, Readable], proof: str | None, place: str) -> str:
    """Return the card of an artifact in a directory called ``place``."""
    shapes = {key: tuple(held.shape) for key, held in tensors.items()}
    return adapter_card(config, shapes, proof, told, _ways(config, tensors, place))


def retell(path: str | Path, told: Told) -> None:
    """Write the card of an artifact anew, with what is known now, on this rank alone; no other file is touched."""
    with ExitStack() as reading:
        held = artifact.open_here(Path(path), reading)
        file = Path(path) / PROOF
        proof = file.read_text() if file.is_file() else None
        text = describe(told, held.config, stored_tensors(held.file), proof, Path(path).resolve().name)
        atomic_write_text(Path(path) / artifact.CARD, text)


def ways_of(path: str | Path) -> list[Way]:
    """Return how the artifact in a directory is loaded, in every place that could; on this rank alone."""
    with ExitStack() as reading:
        held = artifact.open_here(Path(path), reading)
        return _ways(held.config, stored_tensors(held.file), str(path))


def _ways(config: ArtifactConfig, tensors: Mapping[str, Readable], place: str) -> list[Way]:
    base = config.base.name
    try:
        shape = shape_of(config.base, "it")
    except ArtifactError:
        shape = None
    if shape is None or base == loading.RANDOM:
        return [loading.here(base, place)]
    chosen, formats = transforms(config, "it"), prompt_formats(config, [entry.name for entry in config.adapters])
    found = [loading.here(base, place)]
    for for_, where in SERVED.items():
        made = [_made(transform, shape, tensors, formats, for_) for transform in chosen]
        pieces = [piece for one in made if not isinstance(one, str) for piece in one]
        reasons = [one for one in made if isinstance(one, str)]
        blocks = _blocks(pieces, config, place, for_, len(chosen) == 1)
        found.append(Way(where, blocks, "" if pieces else reasons[0].removesuffix(".")))
    return found


def _made(
    transform: PEFT,
    shape: Shape,
    tensors: Mapping[str, Readable],
    formats: Mapping[str, Mapping[str, Any]],
    for_: str,
) -> list[Piece] | str:
    """Return what an adapter would be exported as, or why it cannot be."""
    wanted = Wanted(for_=for_)
    try:
        return pieces_of([transform], checked([transform], shape, wanted), shape, tensors, formats, wanted)
    except GraftworkError as error:
        return str(error)


def _blocks(
    pieces: Sequence[Piece], config: ArtifactConfig, place: str, for_: str, alone: bool
) -> list[tuple[str, str]]:
    """Return the commands that export and load each of the pieces."""
    blocks, base = [], config.base.name
    for piece in pieces:
        output = f"{for_}-{piece.adapter}"
        blocks.append(loading.export(place, output, piece.adapter, alone, for_))
        inside = f"{output}/{piece.place}".rstrip("/")
        if for_ == "vllm":
            blocks.append(loading.vllm(base, inside, piece.adapter, piece.config.get("r")))
        else:
            blocks.append(loading.peft(base, inside, piece.config["task_type"] == "SEQ_2_SEQ_LM"))
    return list(dict.fromkeys(blocks))
