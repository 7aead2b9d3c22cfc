"""models.load: a base model from a directory, a GGUF file or a name."""

from pathlib import Path
from typing import TypedDict, Unpack

import lightning.pytorch as pl

from graftwork.models.base import Model
from graftwork.models.weights import family_of, read_config, shape_from_hf
from graftwork.models.weights.hub import resolve
from graftwork.registry import Registry

MODELS: Registry[type[Model]] = Registry("kind of model")
"""The class of every kind of model, entered by the package; a checkpoint's family names its kind."""


class Options(TypedDict, total=False):
    """What else a model's constructor takes."""

    recompute: str | None
    seed: int


def load(
    path_or_name: str | Path,
    *,
    trainer: pl.Trainer | None = None,
    dtype: str | None = None,
    **options: Unpack[Options],
) -> Model:
    """Return a model with the base weights of ``path_or_name``.

    Without a trainer it is built now, in a parallel state of one process; with one it is built when the trainer
    starts, in the trainer's layout. ``dtype`` None keeps the checkpoint's; further options go to the model's class.
    Raises CheckpointError when there is no such checkpoint.
    """
    directory = resolve(str(path_or_name))
    config = read_config(directory)
    kind = MODELS[family_of(config).kind]
    model = kind(shape_from_hf(config), checkpoint=str(path_or_name), dtype=dtype, **options)
    if trainer is None:
        model.configure_model()
    return model
