"""What strategy and callbacks ask of the model in training and of its trainer; no model class is known here."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Protocol, cast, runtime_checkable

from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn

from graftwork.batch import Batch
from graftwork.data.source import Source
from graftwork.models.loss import LossFunction
from graftwork.optim import AdamW
from graftwork.peft import PEFT
from graftwork.peft.artifact.card import NOTHING, Told


class Trainee(Protocol):
    """A LightningModule that holds megatron-core modules and runs a microbatch through one of them."""

    @property
    def module(self) -> object:
        """This rank's megatron-core module, or a list of virtual pipeline stages."""
        ...

    @property
    def adapters(self) -> Mapping[str, PEFT]:
        """The stack's transforms by name; empty in full fine-tuning."""
        ...

    def prepare(self, optim: AdamW | None = None, seed: int | None = None) -> None:
        """Take the run's optimizer and, unless the model is built already, its seed."""
        ...

    def forward_step(self, data_iterator: Iterator[Batch], module: nn.Module, /) -> tuple[Tensor, LossFunction]:
        """Run the next microbatch; return its output and the function that reads its loss."""
        ...

    def save_adapters(
        self, path: Path, *, step: int, recipe: str | None, verify: bool = True, told: Told = NOTHING
    ) -> object:
        """Write the adapters as one artifact directory, from every rank together."""
        ...

    def export_hf(self, path: Path) -> object:
        """Write the base weights as a Hugging Face directory, from every rank together."""
        ...


@runtime_checkable
class HasFiles(Protocol):
    """Data that come from files."""

    files: Mapping[str, Source | None]
    """What each split is read from."""


def trainee(module: LightningModule | None) -> Trainee:
    """Return Lightning's ``module`` as what it is here."""
    assert module is not None, "the trainer has no model yet"
    return cast(Trainee, module)


def callbacks_of(trainer: Trainer) -> list[Callback]:
    """Return the trainer's own list of callbacks, which Lightning does not declare."""
    found: list[Callback] = getattr(trainer, "callbacks", [])
    return found


def data_of(trainer: Trainer) -> object:
    """Return the data module, None without one; Lightning does not declare it either."""
    found: object = getattr(trainer, "datamodule", None)
    return found
