"""``trainer.pt``: what Lightning keeps of a run, passed on only where it is what Lightning could have written.

States of earlier versions have no checksum, and whoever may write a state may sign it: Lightning itself takes any
value, and fails somewhere in the middle of the run that follows.
"""

from pathlib import Path
from typing import Annotated, Optional

from pydantic import BaseModel, ConfigDict, Field, StrictBool, StrictStr

from graftwork.jsonfile import validated
from graftwork.parallel.tensor_index import DamagedError
from graftwork.parallel.torch_file import read_torch

TRAINER = "trainer.pt"
_VERSION = r"^[2-9]\.\d{1,4}(\.\d{1,4}){0,2}(\.?[a-z]{1,4}\d{1,8})?$"
Count = Annotated[int, Field(strict=True, ge=0, le=2**60)]


class _Counts(BaseModel):
    """How often something has begun and ended; what an event does not count is absent."""

    model_config = ConfigDict(extra="forbid")
    ready: Count
    completed: Count
    started: Count = 0
    processed: Count = 0


class _Progress(BaseModel):
    total: _Counts
    current: _Counts


class _BatchProgress(_Progress):
    is_last_batch: StrictBool


class _Optimizer(BaseModel):
    step: _Progress
    zero_grad: _Progress


class _Optimization(BaseModel):
    optimizer: _Optimizer


class _Fit(BaseModel):
    """The loops of a fit by Lightning's dotted names; further names, of which Lightning reads none, may stand here."""

    own: dict[str, list[dict[str, object]]] = Field({}, alias="state_dict")
    epochs: _Progress = Field(alias="epoch_progress")
    epoch: dict[str, Count] = Field(alias="epoch_loop.state_dict")
    batches: _BatchProgress = Field(alias="epoch_loop.batch_progress")
    schedulers: _Progress = Field(alias="epoch_loop.scheduler_progress")
    steps: _Optimization = Field(alias="epoch_loop.automatic_optimization.optim_progress")
    steps_state: dict[str, object] = Field({}, alias="epoch_loop.automatic_optimization.state_dict", max_length=0)
    manual: Optional[_Progress] = Field(None, alias="epoch_loop.manual_optimization.optim_step_progress")
    manual_state: dict[str, object] = Field({}, alias="epoch_loop.manual_optimization.state_dict", max_length=0)
    validation: Optional[_BatchProgress] = Field(None, alias="epoch_loop.val_loop.batch_progress")
    validation_state: dict[str, object] = Field({}, alias="epoch_loop.val_loop.state_dict", max_length=0)


class _Loops(BaseModel):
    fit_loop: _Fit


class _Trainer(BaseModel):
    """The file. Callbacks, data, schedules and hooks check what is theirs."""

    epoch: Count
    global_step: Count
    lightning: StrictStr = Field(alias="pytorch-lightning_version", pattern=_VERSION)
    loops: _Loops
    callbacks: dict[StrictStr, dict[str, object]] = {}
    lr_schedulers: list[dict[str, object]]


def read_trainer(directory: Path, step: int) -> dict[str, object]:
    """Return Lightning's checkpoint in the state ``directory``, which is of ``step``; raises DamagedError."""
    found = read_torch(directory / TRAINER, DamagedError)
    if not isinstance(found, dict):
        raise DamagedError(f"{TRAINER} holds no training loops")
    known = validated(found, _Trainer, TRAINER, DamagedError)
    fit = known.loops.fit_loop
    made = fit.steps.optimizer.step.total.completed or (fit.manual.total.completed if fit.manual else 0)
    for what, value in (("of step", known.global_step), ("after step", made)):
        if value != step:
            raise DamagedError(f"{TRAINER} is {what} {value}, the state of {step}")
    return found
