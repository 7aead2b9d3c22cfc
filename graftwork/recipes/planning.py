"""Planning a recipe: what it will be, and refusing one that cannot work; nothing of it is run or downloaded."""

import os
from collections.abc import Sequence
from dataclasses import fields, replace
from pathlib import Path

import fiddle as fdl
import nemo_run as run
import torch

from graftwork.data import SFTDataModule
from graftwork.data.tokenizer import Tokenizer, checkpoint_tokenizer
from graftwork.errors import CheckpointError, ConfigError, DataError, GraftworkError, ParallelismError
from graftwork.layout import Layout
from graftwork.models.base import Model
from graftwork.models.precision import resolve_dtype
from graftwork.peft import PEFT
from graftwork.planning.advice import advise, parse_fit
from graftwork.planning.base import look_at_base
from graftwork.planning.blueprint import Blueprint
from graftwork.planning.checks import STRATEGY, Intent
from graftwork.planning.devices import CPU, DEVICES, Device, device_named, this_gpu
from graftwork.planning.inspection import MOST, SHOWN, Inspection, inspect
from graftwork.planning.judge import Candidate
from graftwork.planning.plan import Plan, look_ahead, make_plan
from graftwork.planning.problem import Problem
from graftwork.planning.rows import RowsFindings, look_at_rows
from graftwork.planning.show import size
from graftwork.planning.workload import Workload


def plan(recipe: run.Partial, devices: Sequence[str] = tuple(DEVICES)) -> Plan:
    """Return the plan of a fine-tuning recipe on ``devices`` (H100, H200, A100, B200, cpu), printable and as JSON.

    The files that the recipe names are looked at, the first rows only; weights are not. Raises GraftworkError for a
    value that a constructor refuses.
    """
    return _plan(recipe, devices)


def fit(recipe: run.Partial, devices: str) -> list[Candidate]:
    """Return the layouts with which a recipe fits ``devices``, such as ``8xH100``, fastest first."""
    world, device = parse_fit(devices)
    model, (data, _) = _model(recipe), _data(recipe)
    return advise(_intent(recipe, model, data, None, None)[0], world, device)


def inspected(recipe: run.Partial, most: int = MOST, shown: int = SHOWN) -> Inspection:
    """Return what the data files of a recipe hold, by the tokenizer that they name or else the base's own.

    Only in the latter case the base is needed on this machine. Raises DataError, ConfigError as ``inspect`` does.
    """
    model, (data, problems) = _model(recipe), _data(recipe)
    if problems or data is None:
        raise ConfigError(problems[0].message if problems else "the recipe has no rows of files to look at.")
    tokenizer = None if data.tokenizer_path else model.tokenizer
    shape = None if data.tokenizer_path else model.shape
    return inspect(data, tokenizer, shape, _transforms(recipe), model.seq2seq, most, shown)


def outlook(recipe: run.Partial) -> str | None:
    """Return a line: adapters, what trains, the memory of the fullest rank and on which device; files are not read.

    None for a model that is not of graftwork. Raises GraftworkError for a value that a constructor refuses.
    """
    made = getattr(recipe.model, "__fn_or_cls__", None)
    if not isinstance(made, type) or not issubclass(made, Model):
        return None
    model, (data, _) = _model(recipe), _data(recipe)
    intent, _ = _intent(recipe, model, data, None, None)
    device = _device(recipe)
    found = look_ahead(intent, device)
    who = ", ".join(one.summary() for one in _transforms(recipe)) or "full fine-tuning"
    share = 100 * found.trainable / max(1, found.total)
    trains = f"{who}: trains {found.trainable:,} of {found.total:,} parameters ({share:.3g} %)"
    where = f"{_ranks(recipe)} x {device.name} ({size(device.memory)})"
    return f"{trains}, on {where}" + ("" if found.peak is None else f", about {size(found.peak)} on the fullest rank")


def _device(recipe: run.Partial) -> Device:
    """Return the device that the trainer would find here, an H100 where it asks for a GPU that is elsewhere."""
    accelerator = getattr(getattr(recipe, "trainer", None), "accelerator", "auto")
    if accelerator != CPU and torch.cuda.is_available():
        return this_gpu()
    return device_named(CPU if accelerator in (CPU, "auto") else "H100")


def refuse_problems(recipe: run.Partial) -> None:
    """Raise ConfigError, with every problem and the field to change, unless a plan finds none."""
    problems = plan(recipe).problems
    if problems:
        raise ConfigError(f"the plan finds {len(problems)} problem(s): {'; '.join(map(str, problems))}")


def _plan(recipe: run.Partial, devices: Sequence[str]) -> Plan:
    model, (data, data_problems) = _model(recipe), _data(recipe)
    transforms = _transforms(recipe)
    base, problems = look_at_base(model.checkpoint, model.shape, model.dtype_name)
    rows, row_problems = None, list[Problem]()
    if data is not None:
        tokenizer = _tokenizer(base.directory)
        rows, row_problems = look_at_rows(data, tokenizer, model.shape, transforms, model.seq2seq)
    intent, found = _intent(recipe, model, data, rows, base.directory)
    made = make_plan(intent, [device_named(name) for name in devices], _title(model))
    every = (*found, *data_problems, *problems, *made.problems, *row_problems)
    return replace(made, rows=rows, base=base, problems=tuple(dict.fromkeys(every)))


def _intent(
    recipe: run.Partial, model: Model, data: SFTDataModule | None, rows: RowsFindings | None, directory: str | None
) -> tuple[Intent, list[Problem]]:
    layout, problems = _layout(recipe)
    blueprint = Blueprint(
        type(model), model.shape, _dtype(model, directory), model.recompute, tuple(_transforms(recipe))
    )
    strategy = getattr(getattr(recipe, "trainer", None), "strategy", None)
    shared: bool | None = getattr(strategy, "distributed_optimizer", None)
    return Intent(blueprint, layout, _ranks(recipe), _workload(data, model, rows), shared), problems


def _model(recipe: run.Partial) -> Model:
    model = fdl.build(recipe.model)
    if not isinstance(model, Model):
        raise ConfigError(f"a plan needs a model of graftwork; the recipe's is {type(model).__name__}.")
    return model


def _data(recipe: run.Partial) -> tuple[SFTDataModule | None, list[Problem]]:
    """Return the rows, None for those of another data module, and what is wrong with their fields."""
    try:
        data = fdl.build(getattr(recipe, "data", None))
    except GraftworkError as error:
        sentence = str(error).split("\n\nFiddle context")[0]
        return None, [Problem(f"data.{sentence.split('=')[0]}", sentence)]
    return (data if isinstance(data, SFTDataModule) else None), []


def _transforms(recipe: run.Partial) -> list[PEFT]:
    return [fdl.build(one) for one in getattr(recipe, "peft", None) or []]


def _layout(recipe: run.Partial) -> tuple[Layout, list[Problem]]:
    strategy = getattr(getattr(recipe, "trainer", None), "strategy", None)
    values = {one.name: getattr(strategy, one.name) for one in fields(Layout) if hasattr(strategy, one.name)}
    try:
        return Layout(**values), []
    except ParallelismError as error:
        return Layout(), [Problem(f"{STRATEGY}.{str(error).split('=')[0]}", str(error))]


def _ranks(recipe: run.Partial) -> int:
    """Return the ranks that the trainer asks for; what is no number counts as one device."""
    trainer = getattr(recipe, "trainer", None)
    devices, nodes = getattr(trainer, "devices", 1), getattr(trainer, "num_nodes", None) or 1
    of_a_node = len(devices) if isinstance(devices, list) else int(str(devices)) if str(devices).isdigit() else 1
    return max(1, of_a_node) * int(nodes)


def _workload(data: SFTDataModule | None, model: Model, rows: RowsFindings | None) -> Workload:
    if data is None:
        return Workload(
            seq_length=min(1024, model.shape.max_position_embeddings), micro_batch_size=1, global_batch_size=8
        )
    known = [split.lengths for split in (rows.splits if rows else ()) if split.name == "train" and split.lengths]
    samples = max(1, data.seq_length // max(1, known[0].median)) if known else Workload.samples
    return Workload(
        seq_length=data.seq_length,
        micro_batch_size=data.micro_batch_size,
        global_batch_size=data.global_batch_size,
        packing=data.packing,
        answer_length=(data.answer_length or data.seq_length) if model.seq2seq else None,
        samples=samples,
    )


def _dtype(model: Model, directory: str | None) -> str:
    found = resolve_dtype(model.dtype_name, None if directory is None else Path(directory))
    return "bf16" if found == torch.bfloat16 else "fp32"


def _tokenizer(directory: str | None) -> Tokenizer | None:
    """Return the base's tokenizer where the base is on this machine."""
    if directory is None or not os.path.isdir(directory):
        return None
    try:
        return checkpoint_tokenizer(Path(directory))
    except (CheckpointError, ConfigError, DataError):
        return None  # the run says what is wrong with it


def _title(model: Model) -> str:
    base = model.checkpoint or "random weights"
    return f"{model.shape.family} model of {model.shape.num_layers} layers x {model.shape.hidden_size} ({base})"


__all__ = ["Candidate", "GraftworkError", "Plan", "fit", "inspected", "plan", "refuse_problems"]
