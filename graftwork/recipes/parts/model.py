"""The base model of a recipe."""

from collections.abc import Callable
from typing import Optional

import nemo_run as run

from graftwork.models import GPT, T5
from graftwork.models.shapes import Shape


def gpt(
    shape: Callable[..., Shape],
    checkpoint: Optional[str] = None,
    dtype: Optional[str] = "bf16",
    recompute: Optional[str] = None,
) -> run.Config:
    """Return a configured GPT of a published shape; ``checkpoint`` None waits for ``model.checkpoint=DIRECTORY``."""
    return run.Config(GPT, shape=run.Config(shape), checkpoint=checkpoint, dtype=dtype, recompute=recompute)


def t5(
    shape: Callable[..., Shape], checkpoint: str, dtype: Optional[str] = "bf16", recompute: Optional[str] = None
) -> run.Config:
    """Return a configured T5 of a published shape."""
    return run.Config(T5, shape=run.Config(shape), checkpoint=checkpoint, dtype=dtype, recompute=recompute)
