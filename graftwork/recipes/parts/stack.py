"""The PEFT stack of a recipe: always a list of configs, so that ``peft[0].dim=16`` works."""

import copy
from collections.abc import Iterable
from typing import Any

import fiddle as fdl
import nemo_run as run

from graftwork.errors import ConfigError
from graftwork.peft import METHODS, PEFT, LoRA

LORA: Any = (run.Config(LoRA),)
"""The default stack: one LoRA as published. A recipe's ``peft`` is declared as what the configs build."""
ATTENTION_LORA: Any = (run.Config(LoRA, target_modules=["linear_qkv", "linear_proj"]),)
"""That of a mixture of experts."""


def stack(peft: object) -> list[run.Config] | None:
    """Return fresh configs of ``peft``: a transform, a list of them, or None and [] for full fine-tuning.

    Raises ConfigError for anything else.
    """
    if peft is None:
        return None
    items = [peft] if isinstance(peft, fdl.Buildable | PEFT) or not isinstance(peft, Iterable) else list(peft)
    return [_config(item) for item in items] or None


def _config(item: object) -> run.Config:
    if isinstance(item, PEFT):
        return run.Config(type(item), **item.hyperparameters())
    if isinstance(item, run.Config) and isinstance(item.__fn_or_cls__, type) and issubclass(item.__fn_or_cls__, PEFT):
        return copy.deepcopy(item)
    raise ConfigError(f"{item!r} is no PEFT transform; give run.Config(METHOD, ...) with one of {', '.join(METHODS)}.")
