"""A PEFT transform: one method as a Lightning callback that wraps modules of a model, or trains tensors of its base."""

import inspect
from collections.abc import Iterable
from typing import Optional, Protocol, TypeVar, Union, runtime_checkable

import lightning.pytorch as pl
import torch
from torch import nn

from graftwork.errors import ConfigError, quoted, suggest
from graftwork.peft.adapter import Adapter, Birth
from graftwork.peft.sites import BaseTensor, Host, Site
from graftwork.virtual_tokens import PromptSlot

N = TypeVar("N", int, float)

LayerChoice = Optional[Union[list[int], dict[str, list[int]]]]
"""Global indices of layers, of every part of the model or of each named part; None: all layers."""

MOST = 2**24
"""Largest rank, width or number of virtual tokens: the bytes of a matrix of two are still a number to torch."""
_FLOAT = torch.finfo(torch.float32)


@runtime_checkable
class Adaptable(Protocol):
    """A model that transforms attach themselves to."""

    def add_adapter(self, transforms: "PEFT") -> None:
        """Attach a transform, now or as soon as the model is built; idempotent by name."""
        ...


class PEFT(pl.Callback):
    """Base of all methods: hyper-parameters, which sites, and which adapter goes there.

    A subclass says where (``find``) and what (``build``), or which tensors of the base it trains (``selects``);
    wrapping, freezing, naming, saving and loading are the same for all. As a callback it attaches itself to the model
    before the model is built.
    """

    default_lr: float = 1e-4
    tasks: Optional[dict[str, int]] = None
    """Number of virtual tokens of each task; None where rows of all tasks are treated alike."""

    def __init__(self, name: str, layers: LayerChoice = None) -> None:
        if not isinstance(name, str) or not name.replace("_", "").replace("-", "").isalnum():
            raise ConfigError(f"An adapter's name may hold letters, digits, '-' and '_'; got {quoted(name)}.")
        if hasattr(nn.ModuleDict(), name):
            raise ConfigError(f"An adapter cannot be named {name!r}, an attribute of torch's modules; choose another.")
        self.name = name
        self.layers = layers
        if not _is_layers(layers) and not (isinstance(layers, dict) and layers and all(map(_is_named, layers.items()))):
            raise ConfigError(
                f"{self}: layers must be a list of whole numbers, or one for each part of the model such as "
                f'{{"encoder": [0, 1], "decoder": [2]}}; got {quoted(layers)}.'
            )

    @classmethod
    def short_name(cls) -> str:
        """Return the method's name on the command line, which is also its adapters' name where none is given."""
        return str(inspect.signature(cls).parameters["name"].default)

    @property
    def state_key(self) -> str:
        """Key of this callback in Lightning's checkpoints: method and name."""
        return f"{type(self).__name__}[{self.name}]"

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Attach this transform to the model that Lightning is about to configure (idempotent by name)."""
        if not isinstance(pl_module, Adaptable):
            raise ConfigError(f"{self} cannot be attached: {type(pl_module).__name__} takes no adapters.")
        pl_module.add_adapter(self)

    def find(self, host: Host) -> list[Site]:
        """Return the sites of this method; raises MatchError when a target matches nothing."""
        raise TypeError(f"{type(self).__name__} must say which sites it wraps.")

    def build(self, site: Site, birth: Birth, host: Host) -> Adapter:
        """Return the adapter module for one site."""
        raise TypeError(f"{type(self).__name__} must say what it builds.")

    def selects(self, host: Host) -> list[BaseTensor]:
        """Return the base's own tensors that this method trains; most methods train none."""
        return []

    def prompt_slots(self, offset: int) -> list[PromptSlot]:
        """Return the virtual tokens this transform owns, from ``offset``; most methods own none."""
        return []

    def holds(self, other: "PEFT") -> bool:
        """Tell whether the trained values of ``other`` have their place here: it is the same transform."""
        return repr(self) == repr(other)

    def lr_scale(self, parameter_name: str) -> float:
        """Return the factor on the learning rate of one of this transform's parameters."""
        return 1.0

    def hyperparameters(self) -> dict[str, object]:
        """Return the constructor's arguments by name: plain data that rebuild this transform."""
        names = list(inspect.signature(type(self).__init__).parameters)[1:]
        return {n: getattr(self, n) for n in names}

    def summary(self) -> str:
        """Return the method, its name and what of its size a training begins with."""
        return str(self)

    def __str__(self) -> str:
        return f"{type(self).__name__} {self.name!r}"

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(f'{k}={v!r}' for k, v in self.hyperparameters().items())})"

    def positive(self, field: str, value: N) -> N:
        """Return ``value`` or raise ConfigError when it is not a number above zero that fp32 holds."""
        known = isinstance(value, int | float) and not isinstance(value, bool)
        if not known or not _FLOAT.tiny <= value <= _FLOAT.max:
            raise ConfigError(f"{self}: {field} must be above 0 and finite in single precision, got {quoted(value)}.")
        return value

    def count(self, field: str, value: int) -> int:
        """Return ``value`` or raise ConfigError when it is not a whole number above zero, at most ``MOST``."""
        if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= MOST:
            raise ConfigError(
                f"{self}: {field} must be a whole number above 0, got {quoted(value)} (at most {MOST:,})."
            )
        return value

    def switch(self, field: str, value: bool) -> bool:
        """Return ``value`` or raise ConfigError when it is neither True nor False."""
        if not isinstance(value, bool):
            raise ConfigError(f"{self}: {field} must be True or False, got {quoted(value)}.")
        return value

    def probability(self, field: str, value: float) -> float:
        """Return ``value`` or raise ConfigError when it is not in [0, 1)."""
        if not isinstance(value, int | float) or not 0.0 <= value < 1.0:
            raise ConfigError(f"{self}: {field} must be in [0, 1), got {quoted(value)}.")
        return value

    def one_of(self, field: str, value: str, valid: Iterable[str]) -> str:
        """Return ``value`` or raise ConfigError that names the valid ones."""
        if value not in valid:
            raise ConfigError(f"{self}: {field} is {quoted(value)}; {suggest(str(value), valid)}")
        return value


def _is_layers(value: object) -> bool:
    if value is None:
        return True
    return isinstance(value, list) and all(isinstance(i, int) and not isinstance(i, bool) for i in value)


def _is_named(item: tuple[object, object]) -> bool:
    part, layers = item
    return isinstance(part, str) and isinstance(layers, list) and _is_layers(layers)
