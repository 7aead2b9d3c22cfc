"""Adapters of an artifact -> Hugging Face PEFT directories, without a model; proved where the base is at hand."""

import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from graftwork.errors import CheckpointError, quoted
from graftwork.models.adapters import attached
from graftwork.models.exchange.export import Wanted, checked, finish, pieces_of, shape_of, warn_of_company, with_bos
from graftwork.models.exchange.piece import Staged, staged
from graftwork.models.exchange.proved import prove
from graftwork.models.streamed import streamed, trained_on
from graftwork.parallel.collective import world_size
from graftwork.peft import PEFT
from graftwork.peft.artifact import directory as artifact
from graftwork.peft.artifact.entries import named, prompt_formats, transforms
from graftwork.peft.artifact.tensors import Contents
from graftwork.peft.artifact.verified import stored_tensors

log = logging.getLogger(__name__)


def export_directory(
    adapter: str | Path, path: str | Path, wanted: Wanted, bos: Callable[[], bool | None], verify: bool = True
) -> list[Path]:
    """Write the adapters of an artifact as ``export_stack`` does, without a model; return the directories.

    ``verify``: where the base that they were trained on is at hand, what was written is proved on it, a layer in memory
    at a time; where it is not, a warning says so.
    """
    with artifact.opened(adapter) as held:
        chosen = named(transforms(held.config, held.path), wanted.names, str(held))
        shape = shape_of(held.config.base, str(held))
        places = checked(chosen, shape, wanted)
        formats = with_bos(chosen, prompt_formats(held.config, [transform.name for transform in chosen]), bos)
        known = replace(wanted, base=wanted.base or held.config.base.name)
        warn_of_company(chosen, stored_tensors(held.file))
        pieces = pieces_of(chosen, places, shape, stored_tensors(held.file), formats, known)
        base = _base(held, wanted.base) if verify else None
        try:
            with staged(Path(path), pieces) as written:
                proofs = {} if base is None else _proofs(held, chosen, base, written)
                finish(written, proofs, Path(path).resolve(), known)
        except OSError as error:
            raise CheckpointError(f"{quoted(path)} cannot be written: {error.strerror}.") from error
    return [Path(path) / piece.place for piece in pieces]


def _base(held: artifact.Artifact, given: str | None) -> Path | None:
    """Return the checkpoint that an artifact was trained on, if it is here; warn that nothing is verified if not."""
    remembered = held.config.base
    found = trained_on(remembered.fingerprint, given, remembered.name)
    if found is not None and world_size() == 1:
        return found
    log.warning(
        "The export is not verified: %s, the base of %s, is not at hand here; name its checkpoint with base=, or run "
        "nemorun graft verify ADAPTER against=EXPORT where it is.",
        quoted(remembered.name),
        held,
    )
    return None


def _proofs(held: artifact.Artifact, chosen: Sequence[PEFT], base: Path, written: Staged) -> dict[str, str]:
    with streamed(base) as model:
        contents = Contents.of(held.file, held.config, [transform.name for transform in chosen])
        with attached(model.stack, chosen, contents, trainable=False):
            pass
        return prove(model, model.shape, written)
