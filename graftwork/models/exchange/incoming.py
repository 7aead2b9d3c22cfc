"""A Hugging Face adapter -> a transform of ours and its tensors; nothing is attached here."""

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from graftwork.errors import ArtifactError, ConfigError
from graftwork.models.exchange import pairs, prompts, scales
from graftwork.models.exchange.lazy import Held, Lazy
from graftwork.models.exchange.places import Places
from graftwork.models.exchange.theirs import Theirs
from graftwork.models.shape import Shape
from graftwork.peft import PEFT

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Arrival:
    """What a Hugging Face adapter is here: a transform, and full tensors by key.

    ``partial``: NaN stands in a tensor where Hugging Face PEFT changes nothing; such values follow from the base.
    """

    transform: PEFT
    tensors: Mapping[str, Lazy]
    partial: bool = False


def converted(theirs: Theirs, shape: Shape, name: str | None) -> Arrival:
    """Return what an opened adapter is for a model of this shape, called ``name`` (None: as its method).

    Raises ArtifactError, naming the field or tensor, for an adapter that cannot be here what it is there.
    """
    try:
        places = Places(shape)
        _check_task(theirs, places)
        held = Held(theirs.stored, str(theirs.fields.where))
        convert = CONVERTERS[theirs.fields.kind]
        transform, tensors, partial, note = convert(theirs.fields, places, shape, held, name)
    except ConfigError as error:
        raise ArtifactError(f"{theirs.fields.where} cannot be loaded: {error}") from error
    log.info("%s arrives as %s%s", theirs.fields.where, transform, f": {note}" if note else "")
    return Arrival(transform, {f"{transform.name}.{key}": lazy for key, lazy in tensors.items()}, partial)


Converted = tuple[PEFT, Mapping[str, Lazy], bool, str]
"""A transform, its tensors without its name, whether they are partial, and what is to be said."""
CONVERTERS: Mapping[str, Callable[..., Converted]] = {
    "LORA": pairs.arriving,
    "IA3": scales.arriving,
    "PROMPT_TUNING": prompts.arriving,
    "P_TUNING": prompts.arriving,
}
"""How each ``peft_type`` arrives."""


def _check_task(theirs: Theirs, places: Places) -> None:
    given = theirs.fields.config.get("task_type")
    task = "SEQ_2_SEQ_LM" if places.seq2seq else "CAUSAL_LM"
    if given not in (None, task):
        theirs.fields.refuse("task_type", f"the base is a {places.family.name}, whose adapters have {task!r}")
