"""How adapters were trained to be asked: templates, BOS and EOS, and the templates of each task."""

from collections.abc import Callable, Collection, Mapping
from typing import Any

from graftwork.errors import ConfigError

PromptFormat = Mapping[str, Any]
"""How rows are put to a model: templates, BOS and EOS, by the names of the data module's options."""

_TEMPLATES = ("prompt_template", "answer_template")


def learned(
    before: PromptFormat | None, now: PromptFormat, kept: Collection[str], trained: Collection[str], who: str
) -> PromptFormat:
    """Return how an adapter is to be asked once it has trained with ``now``: ``kept`` tasks as ``before``.

    Raises ConfigError when the kept tasks would be asked in another way than they were trained with.
    """
    if before is None or not kept:
        return dict(now)
    for key in now.keys() & before.keys() - set(_TEMPLATES):
        if now[key] != before[key]:
            raise ConfigError(
                f"{who}: {key}={now[key]!r}, but its tasks {', '.join(kept)} were trained with {before[key]!r}; "
                "all tasks of an adapter share it."
            )
    joined = {key: _join(_by_task(before.get(key), kept), _by_task(now.get(key), trained)) for key in _TEMPLATES}
    return {**before, **now, **{key: value for key, value in joined.items() if value is not None}}


def edited(known: PromptFormat, edit: Callable[[Mapping[str, str]], Mapping[str, str]]) -> PromptFormat:
    """Return ``known`` with what is given by task changed."""
    return {key: dict(edit(value)) if isinstance(value, Mapping) else value for key, value in known.items()}


def differ(theirs: object, trained: object) -> bool:
    """Tell whether two values of an option differ, for a task that both speak of."""
    if not isinstance(theirs, Mapping) and not isinstance(trained, Mapping):
        return theirs != trained
    tasks = [value.keys() for value in (theirs, trained) if isinstance(value, Mapping)]
    shared = tasks[0] & tasks[-1]
    return _by_task(theirs, shared) != _by_task(trained, shared)


def _by_task(template: object, tasks: Collection[str]) -> dict[str, object]:
    """Return the template of each of ``tasks`` for which there is one."""
    if isinstance(template, Mapping):
        return {task: template[task] for task in tasks if task in template}
    return {} if template is None else dict.fromkeys(tasks, template)


def _join(before: dict[str, object], now: dict[str, object]) -> object:
    """Return templates by task, or the one that all of them share; None where there is none."""
    texts = {**before, **now}
    alike = len(set(map(str, texts.values()))) == 1
    return next(iter(texts.values())) if alike else texts or None
