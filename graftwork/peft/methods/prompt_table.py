"""What methods with virtual tokens share: rows beside the word embedding, one table for all inputs or one per task."""

from collections.abc import Callable, Collection, Mapping, Sequence
from copy import copy
from dataclasses import replace
from itertools import accumulate
from typing import ClassVar, Optional, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from graftwork.errors import ConfigError, MatchError, quoted, suggest
from graftwork.peft.adapter import Adapter, Birth, Inner
from graftwork.peft.embedding import EmbeddingLookup
from graftwork.peft.method import PEFT
from graftwork.peft.sites import Host, Site
from graftwork.virtual_tokens import PLACEMENTS, VIRTUAL_BASE, PromptSlot

VIRTUAL_TOKENS = 10
"""Length of a prompt where nothing else is said."""
MOST_TASKS = 4096
LONGEST_NAME = 200


class VirtualRows(EmbeddingLookup):
    """Rows for virtual token ids around the word embedding, which never sees such an id; other ids pass to it."""

    why_not_mergeable = "virtual tokens are rows that the base does not have"

    def prompts(self) -> Sequence["PromptTable"]:
        """Return the prompts whose rows these are."""
        raise TypeError(f"{type(self).__name__} must say which prompts it holds.")

    def forward(self, inner: Inner, ids: Tensor) -> Tensor:
        """Look virtual ids [b, s] up in the prompts' rows and all others in ``inner``."""
        prompts = self.prompts()
        row, first = torch.full_like(ids, -1), 0
        for prompt in prompts:
            here = (ids >= prompt.first) & (ids < prompt.first + prompt.length)
            row = torch.where(here, ids - prompt.first + first, row)
            first += prompt.length
        mine = row >= 0  # ids say it, whatever the routes
        output = inner(ids.masked_fill(mine, 0))
        table = prompts[0].rows() if len(prompts) == 1 else torch.cat([prompt.rows() for prompt in prompts])
        rows = F.embedding(self.like_output(row.clamp(min=0)), table)
        return torch.where(self.like_output(mine).unsqueeze(-1), rows.to(output.dtype), output)


class PromptTable(VirtualRows):
    """One prompt: the ids from ``VIRTUAL_BASE + slot.offset`` to ``+ slot.length`` name its rows."""

    def __init__(self, birth: Birth, base: nn.Module, slot: PromptSlot) -> None:
        super().__init__(birth, base)
        self.first = VIRTUAL_BASE + slot.offset
        self.length = slot.length

    @property
    def trains(self) -> bool:
        """Whether any of its tensors requires a gradient."""
        return any(parameter.requires_grad for parameter in self.parameters())

    def rows(self) -> Tensor:
        """Return the [length, hidden] rows."""
        raise TypeError(f"{type(self).__name__} must say how its rows are made.")

    def prompts(self) -> Sequence["PromptTable"]:
        """Return this prompt."""
        return (self,)


class TaskTables(VirtualRows):
    """A prompt of its own for every task: none of them sees another's rows, or changes when another is trained."""

    def __init__(self, birth: Birth, base: nn.Module, tables: Mapping[str, PromptTable]) -> None:
        super().__init__(birth, base)
        self.tasks = nn.ModuleDict(dict(tables))

    def of(self, task: str) -> PromptTable:
        """Return the prompt of one task."""
        found = self.tasks[task]
        assert isinstance(found, PromptTable)
        return found

    def prompts(self) -> Sequence[PromptTable]:
        """Return the prompts of all tasks."""
        return [self.of(task) for task in self.tasks]

    def derive(self) -> None:
        """Compute the initial values that depend on the base, task by task."""
        for prompt in self.prompts():
            prompt.derive()

    def extra_tensors(self) -> dict[str, Tensor]:
        """Return what each task's prompt saves beside its parameters."""
        return {
            f"tasks.{task}.{key}": value for task in self.tasks for key, value in self.of(task).extra_tensors().items()
        }

    def moved(self) -> bool:
        """Tell whether training has changed every task that trains."""
        return all(prompt.moved() for prompt in self.prompts() if prompt.trains)

    def put(self, task: str, table: PromptTable) -> None:
        """Add the prompt of another task."""
        self.tasks[task] = table

    def drop(self, task: str) -> None:
        """Take the prompt of one task away."""
        del self.tasks[task]

    def rename(self, old: str, new: str) -> None:
        """Call a task by another name, in its place."""
        self.tasks = nn.ModuleDict({new if task == old else task: self.of(task) for task in self.tasks})


class PromptMethod(PEFT):
    """Base of the methods with virtual tokens: ``table`` says what stands behind those of one prompt.

    ``tasks`` is None (one prompt for all rows) or the number of virtual tokens of each task.
    """

    by_task: ClassVar[tuple[str, ...]] = ("tasks",)
    """Hyper-parameters that may be given by task."""
    virtual_tokens: int
    placement: str

    def place(self, virtual_tokens: int, placement: str, tasks: Optional[dict[str, int]]) -> None:
        """Take and check how many virtual tokens there are, for which tasks, and where they stand."""
        self.tasks = tasks
        self.virtual_tokens = self.count("virtual_tokens", virtual_tokens)
        self.placement = self.one_of("placement", placement, PLACEMENTS)
        if tasks is not None and virtual_tokens != VIRTUAL_TOKENS:
            raise ConfigError(
                f"{self} has virtual_tokens={virtual_tokens}, but its tasks say how many virtual tokens each has; "
                "leave virtual_tokens out."
            )
        self.check_tasks()

    def find(self, host: Host) -> list[Site]:
        """Return the word embedding (on the first pipeline stage)."""
        return host.select(host.sites(), ["embedding.word_embeddings"], None, str(self))

    def table(self, birth: Birth, base: nn.Module, slot: PromptSlot, host: Host) -> PromptTable:
        """Return the prompt that stands behind the virtual ids of ``slot``."""
        raise TypeError(f"{type(self).__name__} must say what a prompt is.")

    def build(self, site: Site, birth: Birth, host: Host) -> Adapter:
        """Build the prompt, or those of all tasks."""
        slots = [slot for slot in host.prompts.slots if slot.name == self.name]
        tables = {slot.task: self.table(birth_of(birth, slot.task), site.module, slot, host) for slot in slots}
        if self.tasks is None:
            return tables[None]
        return TaskTables(birth, site.module, {task: table for task, table in tables.items() if task is not None})

    def prompt_slots(self, offset: int) -> list[PromptSlot]:
        """Return the virtual ids of this prompt, or of those of all tasks."""
        if self.tasks is None:
            return [PromptSlot(self.name, offset, self.virtual_tokens, self.placement)]
        return self.slots(self.tasks, offset)

    def slots(self, tasks: Mapping[str, int], offset: int) -> list[PromptSlot]:
        """Return the virtual ids of some tasks' prompts, one after the other."""
        starts = accumulate(tasks.values(), initial=offset)
        return [
            PromptSlot(self.name, start, n, self.placement, task) for (task, n), start in zip(tasks.items(), starts)
        ]

    def holds(self, other: PEFT) -> bool:
        """Tell whether ``other`` is this transform, or this one with fewer tasks."""
        if not isinstance(other, type(self)) or self.tasks is None or other.tasks is None:
            return super().holds(other)
        mine, theirs = ({**t.hyperparameters(), **t.of_tasks(other.tasks)} for t in (self, other))
        return repr(mine) == repr(theirs)

    def of_tasks(self, tasks: Collection[str]) -> dict[str, object]:
        """Return the hyper-parameters that are given by task, for some of the tasks, in their order."""
        return {field: {task: values.get(task) for task in tasks} for field, values in self._given_by_task()}

    def with_tasks(self, tasks: Mapping[str, int], texts: Mapping[str, str] | None = None) -> Self:
        """Return this transform with further ``tasks``; raises ConfigError for such that cannot be."""
        if texts is not None:
            raise ConfigError(f"{self} starts from no text of a task; leave init_text out.")
        other = copy(self)
        other.tasks = {**(self.tasks or {}), **tasks}
        other.check_tasks()
        return other

    def without_task(self, task: str) -> Self:
        """Return this transform without one of its tasks."""
        return self._edited(lambda values: {key: value for key, value in values.items() if key != task})

    def with_renamed(self, old: str, new: str) -> Self:
        """Return this transform with another name for one of its tasks."""
        return self._edited(lambda values: {new if key == old else key: value for key, value in values.items()})

    def known_tasks(self, names: Collection[str]) -> list[str]:
        """Return ``names``; raises MatchError for one that is no task of this transform."""
        if self.tasks is None:
            raise MatchError(f"{self} has one prompt for all rows and no tasks; give it tasks={{...}} when it is made.")
        for name in names:
            if name not in self.tasks:
                raise MatchError(f"{self} has no task {quoted(name)}; {suggest(str(name), self.tasks)}")
        return list(names)

    def check_tasks(self) -> None:
        """Raise ConfigError unless every task has a name and a length."""
        if self.tasks is None:
            return
        if not isinstance(self.tasks, dict) or not 1 <= len(self.tasks) <= MOST_TASKS:
            raise ConfigError(
                f"{type(self).__name__} {self.name!r}: tasks must name each task's number of virtual tokens, such as "
                f"{{'squad': 20}}; got {quoted(self.tasks)} (at most {MOST_TASKS:,})."
            )
        for task, length in self.tasks.items():
            self._check_name(task)
            self.count(f"tasks[{task!r}]", length)
        self.count("the number of virtual tokens of all tasks", sum(self.tasks.values()))

    def _given_by_task(self) -> list[tuple[str, dict[str, object]]]:
        values = [(field, getattr(self, field)) for field in self.by_task]
        return [(field, value) for field, value in values if isinstance(value, dict)]

    def _edited(self, edit: Callable[[dict[str, object]], dict[str, object]]) -> Self:
        other = copy(self)
        for field, values in self._given_by_task():
            setattr(other, field, edit(values))
        other.check_tasks()
        return other

    def _check_name(self, task: object) -> None:
        text = task.replace("_", "").replace("-", "") if isinstance(task, str) else ""
        if not text.isalnum() or not isinstance(task, str) or len(task) > LONGEST_NAME:
            raise ConfigError(
                f"{self}: a task's name may hold letters, digits, '-' and '_', at most {LONGEST_NAME}; "
                f"got {quoted(task)}."
            )
        if hasattr(nn.ModuleDict(), task):
            raise ConfigError(
                f"{self}: a task cannot be named {task!r}, an attribute of torch's modules; choose another."
            )


def birth_of(birth: Birth, task: str | None) -> Birth:
    """Return where the prompt of a task is born: its values are its own, whatever other tasks there are."""
    return birth if task is None else replace(birth, site=f"{birth.site}.tasks.{task}")
