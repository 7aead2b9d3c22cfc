"""The tasks of a prompt: added, taken away, renamed and trained, while the other tasks keep every bit."""

from collections.abc import Collection, Mapping
from dataclasses import replace

from graftwork.errors import MatchError
from graftwork.parallel.collective import agreed
from graftwork.peft.adapter import Adapter
from graftwork.peft.asking import edited
from graftwork.peft.method import PEFT
from graftwork.peft.methods.prompt_table import PromptMethod, PromptTable, TaskTables, birth_of
from graftwork.peft.stack import Stack
from graftwork.peft.wrapper import parameter_device
from graftwork.virtual_tokens import PromptLayout, PromptSlot

New = tuple[TaskTables, str, PromptTable]
"""The adapter that a prompt is new in, its task, the prompt itself."""


def add_tasks(stack: Stack, name: str, tasks: Mapping[str, int], texts: Mapping[str, str] | None = None) -> None:
    """Give prompt ``name`` further tasks; from then on they train, and nothing else of the model does.

    Raises MatchError or ConfigError for tasks that are there or cannot be, on every rank and before one is changed.
    """
    stack.check_on()
    transform = _with_tasks(stack, name)
    for task in tasks:
        _check_new(transform, task)
    longer = transform.with_tasks(tasks, texts)
    slots = longer.slots(tasks, stack.layout.size)
    layout = stack.layout.joined(name, slots)
    for adapter, task, table in agreed(lambda: _new_tables(stack, longer, slots, layout)):
        table.derive()
        table.train(adapter.training)
        adapter.put(task, table)
    stack.transforms[name], stack.layout = longer, layout
    stack.train_only([])
    stack.train_tasks(name, tasks)


def remove_task(stack: Stack, name: str, task: str) -> None:
    """Take one task off prompt ``name``; raises MatchError for one that it does not have, and for its last one."""
    stack.check_on()
    transform = _with_tasks(stack, name)
    transform.known_tasks([task])
    if len(transform.tasks or ()) == 1:
        raise MatchError(f"{task!r} is the only task of {transform}; delete the adapter instead.")
    for tables in _tables(stack, name):
        tables.drop(task)
    stack.transforms[name] = transform.without_task(task)
    stack.layout = stack.layout.without(name, task)
    stack.frozen_tasks[name] = stack.frozen_tasks.get(name, frozenset()) - {task}
    if name in stack.prompt_formats:
        known = stack.prompt_formats[name]
        stack.prompt_formats[name] = edited(known, lambda texts: {t: text for t, text in texts.items() if t != task})


def rename_task(stack: Stack, name: str, old: str, new: str) -> None:
    """Call a task of prompt ``name`` by another name; raises MatchError or ConfigError for names that cannot be."""
    stack.check_on()
    transform = _with_tasks(stack, name)
    transform.known_tasks([old])
    _check_new(transform, new)

    def renamed(task: str | None) -> str | None:
        return new if task == old else task

    stack.transforms[name] = transform.with_renamed(old, new)  # refuses what is no name
    for tables in _tables(stack, name):
        tables.rename(old, new)
    slots = (replace(s, task=renamed(s.task)) if s.name == name else s for s in stack.layout.slots)
    stack.layout = PromptLayout(tuple(slots))
    stack.frozen_tasks[name] = frozenset(new if t == old else t for t in stack.frozen_tasks.get(name, ()))
    if name in stack.prompt_formats:
        known = stack.prompt_formats[name]
        stack.prompt_formats[name] = edited(known, lambda texts: {renamed(t) or t: x for t, x in texts.items()})


def train_tasks(stack: Stack, name: str, tasks: Collection[str]) -> None:
    """Make exactly these tasks of prompt ``name`` trainable and freeze its others; other adapters stay as they are."""
    _with_tasks(stack, name).known_tasks(tasks)
    stack.train_tasks(name, tasks)


def _with_tasks(stack: Stack, name: str) -> PromptMethod:
    """Return the transform called ``name``; raises MatchError when it is not attached or has no tasks."""
    stack.known([name])
    transform = stack.transforms[name]
    if not isinstance(transform, PromptMethod):
        raise MatchError(f"{transform} has no tasks; only methods with virtual tokens do.")
    transform.known_tasks(())
    return transform


def _check_new(transform: PEFT, task: str) -> None:
    if task in (transform.tasks or ()):
        raise MatchError(
            f"{transform} already has a task {task!r}; its tasks are {', '.join(transform.tasks or ())}: choose "
            "another name, or remove that task first."
        )


def _new_tables(stack: Stack, transform: PromptMethod, slots: list[PromptSlot], layout: PromptLayout) -> list[New]:
    host = replace(stack.host, prompts=layout)
    found = []
    for item in stack.grafted[transform.name]:
        tables, device = _as_tables(item.adapter), parameter_device(host.chunks[item.site.chunk])
        birth = replace(tables.birth, device=device)
        for slot in slots:
            table = transform.table(birth_of(birth, slot.task), item.site.module, slot, host)
            found.append((tables, slot.task or "", table))
    return found


def _tables(stack: Stack, name: str) -> list[TaskTables]:
    return [_as_tables(item.adapter) for item in stack.grafted[name]]


def _as_tables(adapter: Adapter) -> TaskTables:
    assert isinstance(adapter, TaskTables), "a transform with tasks builds nothing else"
    return adapter
