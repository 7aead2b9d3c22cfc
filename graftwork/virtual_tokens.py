"""Virtual tokens are token ids: where they start, and which prompt owns which of them.

The layout is a plain object of the lowest floor: prompt adapters make it, data templates read it, and
neither of the two imports the other.
"""

from collections.abc import Iterable
from dataclasses import dataclass

from graftwork.errors import MatchError, suggest
from graftwork.ways import Way

VIRTUAL_BASE = 2**30
"""First virtual id; a constant, so tokenised data do not depend on the (padded) vocabulary size."""

PLACEMENTS = ("prefix", "before_bos", "template")


@dataclass(frozen=True)
class PromptSlot:
    """One prompt: ``length`` consecutive virtual ids from ``VIRTUAL_BASE + offset``, owned by adapter ``name``."""

    name: str
    offset: int
    length: int
    placement: str = "prefix"
    task: str | None = None

    @property
    def ids(self) -> list[int]:
        """The slot's token ids, in order."""
        return list(range(VIRTUAL_BASE + self.offset, VIRTUAL_BASE + self.offset + self.length))


@dataclass(frozen=True)
class PromptLayout:
    """All prompts of a model; empty when no prompt adapter is attached.

    ``off``: adapters are switched off, so there is no prompt and a template's markers stand for nothing.
    """

    slots: tuple[PromptSlot, ...] = ()
    off: bool = False

    @property
    def size(self) -> int:
        """Number of virtual ids that exist."""
        return max((s.offset + s.length for s in self.slots), default=0)

    @property
    def tasks(self) -> dict[str, list[str]]:
        """The tasks of every prompt that is kept per task, by the prompt's name."""
        found: dict[str, list[str]] = {}
        for slot in self.slots:
            if slot.task is not None:
                found.setdefault(slot.name, []).append(slot.task)
        return found

    def ids(self, name: str, task: str | None = None) -> list[int]:
        """Ids of prompt ``name`` (and ``task``); raises MatchError naming the prompts, or its tasks, that exist."""
        for slot in self.slots:
            if slot.name == name and slot.task == task:
                return slot.ids
        if name in self.tasks:
            raise MatchError(f"prompt {name!r} has no task {task!r}; {suggest(task or '', self.tasks[name])}")
        raise MatchError(f"no prompt is called {name!r}; {suggest(name, (s.name for s in self.slots))}")

    def placed(self, placement: str, task: str | None = None) -> list[int]:
        """Ids of every prompt with this placement that serves ``task``, in stack order."""
        chosen = (s for s in self.slots if s.placement == placement and s.task in (None, task))
        return [i for slot in chosen for i in slot.ids]

    def appended(self, slots: Iterable[PromptSlot]) -> "PromptLayout":
        """Return a layout with ``slots`` added."""
        return PromptLayout((*self.slots, *slots))

    def on(self, way: Way) -> "PromptLayout":
        """Return a layout of the prompts that act on rows of this way."""
        return self if way is None else PromptLayout(tuple(s for s in self.slots if s.name in way), self.off)

    def without(self, name: str, task: str | None = None) -> "PromptLayout":
        """Return a layout without prompt ``name``, or without one ``task`` of it."""
        return PromptLayout(tuple(s for s in self.slots if s.name != name or task not in (None, s.task)))

    def joined(self, name: str, slots: Iterable[PromptSlot]) -> "PromptLayout":
        """Return a layout with further ``slots`` of prompt ``name`` behind those that it has, so that order is kept."""
        last = max(place for place, slot in enumerate(self.slots) if slot.name == name)
        return PromptLayout((*self.slots[: last + 1], *slots, *self.slots[last + 1 :]))
