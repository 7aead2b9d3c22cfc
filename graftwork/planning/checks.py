"""What cannot work in a run, each with the field to change: sizes that do not divide, transforms that do not fit."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from graftwork.errors import GraftworkError
from graftwork.layout import Layout
from graftwork.models.adapters import refuse_long_prompts
from graftwork.models.base import Model
from graftwork.models.fitting import refuse_length
from graftwork.peft import PEFT
from graftwork.planning.blueprint import Blueprint
from graftwork.planning.problem import Problem
from graftwork.planning.workload import Workload

STRATEGY = "trainer.strategy"


@dataclass(frozen=True)
class Intent:
    """A run as it is meant: the model with its adapters, the layout over ``world`` ranks, the rows of a step.

    ``distributed_optimizer``: whether data-parallel ranks share the optimizer out; None: in full fine-tuning.
    """

    blueprint: Blueprint
    layout: Layout
    world: int
    workload: Workload
    distributed_optimizer: bool | None = None

    @property
    def shards(self) -> int:
        """Ranks that share moments and masters out, 1 where each has its own."""
        shared = self.distributed_optimizer
        ranks = self.layout.data_parallel_size(self.world) * self.layout.context_parallel_size
        return ranks if shared or (shared is None and not self.blueprint.transforms) else 1


def layout_problems(intent: Intent) -> list[Problem]:
    """Return the sizes that contradict each other; the plan of memory and time needs none."""
    layout, work, world = intent.layout, intent.workload, intent.world
    rows = work.global_batch_size, work.micro_batch_size, world
    checks: list[tuple[str, Callable[[], object]]] = [
        ("trainer.devices", lambda: layout.data_parallel_size(world)),
        (STRATEGY, lambda: layout.check_shape(intent.blueprint.shape)),
    ]
    if not (found := _failed(checks)):
        found = _failed([("data.global_batch_size", lambda: layout.check_batch(*rows))])
    if work.packing:
        found += _failed([("data.packing", lambda: layout.check_packing(work.seq_length))])
    return found


def row_problems(intent: Intent) -> list[Problem]:
    """Return what the model cannot do with rows of this length and kind."""
    work, shape, kind = intent.workload, intent.blueprint.shape, intent.blueprint.kind
    found = []
    if work.packing and kind.seq2seq:
        found.append(Problem("data.packing", "an encoder-decoder's rows cannot be packed; False is valid."))
    if work.seq_length % intent.layout.pad_to_multiple and not work.packing:
        multiple = intent.layout.pad_to_multiple
        found.append(Problem("data.seq_length", f"{work.seq_length} is no multiple of {multiple}, which ranks divide."))
    found += _failed([("data.seq_length", lambda: refuse_length(work.seq_length, shape.max_position_embeddings))])
    prompts = {str(one): sum(slot.length for slot in one.prompt_slots(0)) for one in intent.blueprint.transforms}
    least = min(shape.max_position_embeddings, work.seq_length)
    return found + _failed([("data.seq_length", lambda: refuse_long_prompts(prompts, least))])


def fitting(blueprint: Blueprint) -> tuple[Model, list[Problem]]:
    """Draft the model with those of its transforms that fit, and say why others do not; inside of ``world_of_one``."""
    try:
        return blueprint.draft(), []
    except GraftworkError:
        kept: list[PEFT] = []
        problems = []
        for index, transform in enumerate(blueprint.transforms):
            try:
                replace(blueprint, transforms=(*kept, transform)).draft()
                kept.append(transform)
            except GraftworkError as error:
                problems.append(Problem(f"peft[{index}]", str(error)))
        return replace(blueprint, transforms=tuple(kept)).draft(), problems


def _failed(checks: Sequence[tuple[str, Callable[[], object]]]) -> list[Problem]:
    found = []
    for field, check in checks:
        try:
            check()
        except GraftworkError as error:
            found.append(Problem(_named(field, str(error)), str(error)))
    return found


def _named(field: str, sentence: str) -> str:
    """Return the field of the strategy that a sentence begins with, where it does."""
    first = sentence.split("=")[0].split(" ")[0]
    if field == STRATEGY:
        return f"{STRATEGY}.{first}" if first in Layout.__dataclass_fields__ else f"{STRATEGY}.sequence_parallel"
    return f"data.{first}" if field.startswith("data.") and first in Workload.__dataclass_fields__ else field
