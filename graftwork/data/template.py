"""Prompt templates: text, fields of the row, and markers where virtual tokens stand.

``"Review: {input}\\nSentiment:"`` names fields of the row; ``{virtual:10}`` takes the next ten virtual tokens of the
adapters placed by template, ``{virtual:name}`` all those of adapter ``name``; ``{{`` and ``}}`` are literal braces.
Rows of several tasks may have one template for all, or one for each task.
"""

import math
import string
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from graftwork.data.schema import Chat, Place, Prompt, is_text
from graftwork.errors import ConfigError, DataError, quoted, suggest
from graftwork.virtual_tokens import PromptLayout, PromptSlot
from graftwork.ways import Way

Template = str | Mapping[str, str]
"""The template of all rows, or that of each task by its name."""


@dataclass(frozen=True)
class Piece:
    """A stretch of a sequence: text still to be tokenised, or ready token ids; ``loss`` where it is learned."""

    text: str = ""
    ids: tuple[int, ...] = ()
    loss: bool = False


@dataclass(frozen=True)
class Field:
    """Stands for the row's field ``name``."""

    name: str


@dataclass(frozen=True)
class Marker:
    """Stands for virtual tokens: ``count`` of them in turn, or all of adapter ``name``."""

    name: str | None = None
    count: int = 0


Part = str | Field | Marker


def parse_template(template: str) -> tuple[Part, ...]:
    """Split a template into literal text, fields and markers; raises ConfigError on a malformed one."""
    try:
        found = list(string.Formatter().parse(template))
    except ValueError as error:
        raise ConfigError(f"template {template!r}: {error}; write {{{{ and }}}} for literal braces.") from None
    parts: list[Part] = []
    for literal, name, option, conversion in found:
        if literal:
            parts.append(literal)
        if name is not None:
            parts.append(_placeholder(template, name, option or "", conversion))
    return tuple(parts)


def _placeholder(template: str, name: str, option: str, conversion: str | None) -> Field | Marker:
    if name == "virtual" and option and not conversion:
        return Marker(count=int(option)) if option.isdecimal() else Marker(name=option)
    if not name.isidentifier() or name == "virtual" or option or conversion:
        shown = "{" + name + (f"!{conversion}" if conversion else "") + (f":{option}" if option else "") + "}"
        raise ConfigError(
            f"template {template!r}: {shown} is not a placeholder; "
            "valid: {field} naming a field of the row, {virtual:10} or {virtual:adapter_name}."
        )
    return Field(name)


class PromptTemplate:
    """Renders rows with ``input`` and ``output``; the answer is tokenised on its own, so generation continues it."""

    def __init__(self, prompt: str, answer: str, layout: PromptLayout) -> None:
        self.prompt = parse_template(prompt)
        self.answer = parse_template(answer)
        self.text = prompt
        self.names = frozenset(part.name for part in self.prompt if isinstance(part, Field))
        self.layout = layout
        self._markers: dict[tuple[str | None, Way], list[tuple[int, ...]]] = {}

    def prompt_pieces(self, row: Prompt, place: Place) -> list[Piece]:
        """The prompt of one row: text and virtual tokens in the template's order."""
        markers = iter(self.markers(row.task, row.way))
        pieces: list[Piece] = []
        for part in self.prompt:
            if isinstance(part, Marker):
                pieces.append(Piece(ids=next(markers)))
            else:
                text = part if isinstance(part, str) else self._value(part.name, row, place)
                # Text and field are one text, so that the tokenizer sees what it would see in plain use.
                before = pieces.pop().text if pieces and not pieces[-1].ids else ""
                pieces.append(Piece(before + text))
        return pieces

    def answer_text(self, output: str) -> str:
        """The answer as it stands after the prompt."""
        return "".join(part if isinstance(part, str) else output for part in self.answer)

    def unread(self, row: Prompt | Chat) -> set[str]:
        """Fields of a row that say something and that nothing reads."""
        fields = row.put(self.names) if isinstance(row, Prompt) else (row.model_extra or {})
        known = self.names if isinstance(row, Prompt) else frozenset()
        return {name for name, value in fields.items() if name not in known and value not in (None, "", [], {})}

    def markers(self, task: str | None, way: Way = None) -> list[tuple[int, ...]]:
        """Virtual ids of every marker in turn, for rows of ``task`` that go this ``way``."""
        if (task, way) not in self._markers:
            every = _bind([p for p in self.prompt if isinstance(p, Marker)], self.layout, task, self.text)
            acting = {i for slot in self.layout.on(way).slots for i in slot.ids}
            self._markers[task, way] = [tuple(i for i in ids if i in acting) for ids in every]
        return self._markers[task, way]

    def _value(self, name: str, row: Prompt, place: Place) -> str:
        fields = row.put(self.names)
        if name not in fields:
            raise DataError(f"{place}: field {name!r} of the prompt template is missing; {suggest(name, fields)}")
        value = fields[name]
        if not isinstance(value, str | int | float) or not _is_text(value):
            raise DataError(f"{place}: field {name!r} must be text to stand in the prompt, got {quoted(value)}.")
        return str(value)


class TaskTemplates:
    """The templates of rows of several tasks: one pair for all of them, or one for each task."""

    def __init__(self, prompt: Template, answer: Template, layout: PromptLayout) -> None:
        check_templates(prompt, answer)
        self.tasks = _tasks(prompt) or _tasks(answer)
        pairs = {task: (_of_task(prompt, task), _of_task(answer, task)) for task in self.tasks or (None,)}
        self._made = {task: PromptTemplate(*pair, layout) for task, pair in pairs.items()}

    def of(self, task: str | None, place: Place) -> PromptTemplate:
        """The templates for rows of ``task``; raises DataError where there are none."""
        found = self._made.get(task if self.tasks else None)
        if found is None:
            raise DataError(f"{place}: {_said(task)}, but its template is chosen by task; {_near(task, self.tasks)}")
        return found

    def unread(self, row: Prompt | Chat, place: Place) -> set[str]:
        """Fields of a row that say something and that nothing reads."""
        any_one = next(iter(self._made.values()))  # a conversation is put by its chat template
        return (any_one if isinstance(row, Chat) else self.of(row.task, place)).unread(row)

    @property
    def key(self) -> tuple[object, object]:
        """What decides, of prompts and of answers, which tokens a row becomes."""
        if not self.tasks:
            return self._made[None].prompt, self._made[None].answer
        return {t: made.prompt for t, made in self._made.items()}, {t: made.answer for t, made in self._made.items()}


def _tasks(template: Template) -> tuple[str, ...]:
    return () if isinstance(template, str) else tuple(template)


def _of_task(template: Template, task: str | None) -> str:
    return template if isinstance(template, str) else template[task or ""]


def _is_text(value: str | float) -> bool:
    """Whether a value of a row reads as text: a missing number ("nan") and half of a surrogate pair do not."""
    if isinstance(value, float):
        return math.isfinite(value)
    return not isinstance(value, str) or is_text(value)


def check_templates(prompt: Template, answer: Template) -> None:
    """Raise ConfigError unless every prompt names a field of the row but not the answer, and every answer ``{output}``.

    Templates given by task must be given for the same tasks.
    """
    for name, template in (("prompt_template", prompt), ("answer_template", answer)):
        if not isinstance(template, str) and not template:
            raise ConfigError(f"{name} names no task; give one template, or one for each task.")
    tasks, others = _tasks(prompt), _tasks(answer)
    if tasks and others and set(tasks) != set(others):
        odd = min(set(tasks) ^ set(others))
        raise ConfigError(
            f"prompt_template is given for the tasks {', '.join(tasks)}, answer_template for {', '.join(others)}: "
            f"only one of them names {odd!r}."
        )
    for text in [prompt] if isinstance(prompt, str) else prompt.values():
        _check_prompt(text)
    for text in [answer] if isinstance(answer, str) else answer.values():
        _check_answer(text)


def _check_prompt(prompt: str) -> None:
    names = [part.name for part in parse_template(prompt) if isinstance(part, Field)]
    if not names or "output" in names:
        raise ConfigError(f"prompt_template {prompt!r} must name a field such as {{input}}, and never {{output}}.")


def _check_answer(answer: str) -> None:
    if [part for part in parse_template(answer) if not isinstance(part, str)] != [Field("output")]:
        raise ConfigError(f"answer_template {answer!r} must hold {{output}} once and no other placeholder.")


def check_task(layout: PromptLayout, task: str | None, place: Place) -> None:
    """Raise DataError when prompts are kept per task and the row does not name one of their tasks."""
    tasks = {known: None for names in layout.tasks.values() for known in names}
    if tasks and task not in tasks:
        raise DataError(f"{place}: {_said(task)}, but its prompt is chosen by task; {_near(task, tasks)}")


def _said(task: str | None) -> str:
    return "the row names no 'task'" if task is None else f"the row has the unknown task {quoted(task)}"


def _near(task: str | None, tasks: Iterable[str]) -> str:
    return suggest(task or "", tasks)


def template_slots(layout: PromptLayout, task: str | None) -> list[PromptSlot]:
    """Prompts that a template has to place in rows of ``task``."""
    return [s for s in layout.slots if s.placement == "template" and s.task in (None, task)]


def _bind(markers: list[Marker], layout: PromptLayout, task: str | None, template: str) -> list[tuple[int, ...]]:
    if layout.off:
        return [() for _ in markers]
    slots = template_slots(layout, task)
    named = {m.name for m in markers if m.name is not None}
    for name in sorted(named - {s.name for s in slots}):
        near = suggest(name, (s.name for s in slots))
        raise ConfigError(f"prompt_template {template!r}: no prompt adapter {name!r} with placement='template'; {near}")
    pool = [i for s in slots if s.name not in named for i in s.ids]
    asked = sum(m.count for m in markers)
    if asked != len(pool):
        raise ConfigError(
            f"prompt_template {template!r} places {asked} virtual tokens by count, but the adapters with "
            f"placement='template' have {len(pool)}{f' for task {task!r}' if task else ''}; "
            "use {virtual:N} or {virtual:adapter_name} so that every one stands once."
        )
    bound, taken = [], 0
    for marker in markers:
        if marker.name is not None:
            bound.append(tuple(i for s in slots if s.name == marker.name for i in s.ids))
        else:
            bound.append(tuple(pool[taken : taken + marker.count]))
            taken += marker.count
    return bound
