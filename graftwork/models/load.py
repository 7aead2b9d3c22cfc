"""models.load: a base model from a directory, a GGUF file or a name."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from graftwork.models.gpt import GPT
from graftwork.models.weights import read_config, shape_from_hf
from graftwork.models.weights.hub import resolve

if TYPE_CHECKING:
    import lightning.pytorch as pl


def load(
    path_or_name: str | Path, *, trainer: "pl.Trainer | None" = None, dtype: str | None = None, **options: Any
) -> GPT:
    """Return a model with the base weights of ``path_or_name``.

    Without a trainer it is built now, in a parallel state of one process; with one it is built when the trainer
    starts, in the trainer's layout. ``dtype`` None keeps the checkpoint's; further options go to ``GPT``.
    Raises CheckpointError when there is no such checkpoint.
    """
    directory = resolve(str(path_or_name))
    shape = shape_from_hf(read_config(directory))
    model = GPT(shape, checkpoint=str(path_or_name), dtype=dtype, **options)
    if trainer is None:
        model.configure_model()
    return model
