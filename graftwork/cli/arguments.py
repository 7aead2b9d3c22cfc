"""Words and options of our own on the command line, beside NeMo Run's FIELD=VALUE and its own options."""

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Optional

from graftwork.errors import ConfigError, suggest

WORDS: dict[str, tuple[str, ...]] = {
    "profile": ("action", "name"),
    "status": ("experiment",),
    "logs": ("experiment",),
    "attach": ("experiment",),
    "cancel": ("experiment",),
    "compare": ("directories*",),
    "verify": ("directory",),
    "completion": ("shell",),
    "data": ("train",),
}
"""The fields of a verb that bare words fill in turn; one that ends in ``*`` takes all that are left, as a list."""

_WITH_VALUE = {"--profile": "profile", "--file": "file", "--from-adapter": "from_adapter", "--fit": "fit"}
_FLAGS = {"--no-plan": ("plan", False), "--all": ("whole", True)}
OPTIONS = (*_WITH_VALUE, *_FLAGS)
"""Our own options, as they are typed."""

OPTION_HELP = {
    "--profile": "Profile of a cluster, which names the executor too: NAME, FILE.yaml or FILE.yaml:NAME.",
    "--file": "Run the recipe of a file that recipes.save wrote.",
    "--from-adapter": "Run the recipe that the adapter in a directory was trained by.",
    "--fit": "Devices to find a layout for, such as 8xH100.",
    "--no-plan": "Submit to another machine without a plan.",
    "--all": "Show every field of the recipe before asking, not only those that were changed.",
}
"""What each of them does."""

_WORD = re.compile(r"[^=\s'\"\[\]()]+")


@dataclass(frozen=True)
class Options:
    """What our own options said.

    ``profile`` names a cluster profile, ``plan`` is False to submit unplanned, ``whole`` shows every field before
    asking, ``file`` and ``from_adapter`` say where the recipe is, ``fit`` names devices to find a layout for.
    """

    profile: Optional[str] = None
    plan: bool = True
    whole: bool = False
    file: Optional[str] = None
    from_adapter: Optional[str] = None
    fit: Optional[str] = None


def own_options(args: Sequence[str], valid: Collection[str]) -> tuple[Options, list[str]]:
    """Take our own options, of which the fields ``valid`` are allowed, out of ``args``; return them and the others.

    Raises ConfigError for an option that is unknown or not allowed, that lacks its value or is given twice.
    """
    found, rest, waiting = Options(), [], list(args)
    allowed = option_names(valid)
    while waiting:
        option, equals, value = waiting[0].partition("=")
        if not option.startswith("--"):
            rest.append(waiting.pop(0))
            continue
        del waiting[0]
        if option not in allowed:
            raise ConfigError(f"there is no option {option} here; {suggest(option, allowed)}")
        if option in _FLAGS:
            found = _told(found, option, *_FLAGS[option])
            continue
        if not equals and (not waiting or waiting[0].startswith("--")):
            raise ConfigError(f"{option} needs a value: {option} VALUE.")
        found = _told(found, option, _WITH_VALUE[option], value if equals else waiting.pop(0))
    return found, rest


def option_names(fields: Collection[str]) -> list[str]:
    """Return our own options for these fields of ``Options``, as they are typed."""
    return [option for option, field in _fields().items() if field in fields]


def words_as_fields(verb: str, args: Sequence[str], words: Mapping[str, Sequence[str]] = WORDS) -> list[str]:
    """Return ``args`` with the bare words of ``verb`` as ``FIELD=WORD``; a verb that takes none keeps them as they are.

    Raises ConfigError for a word too many.
    """
    fields, given = list(words.get(verb, ())), [arg for arg in args if _WORD.fullmatch(arg)]
    if not fields or not given:
        return list(args)
    single = [field for field in fields if not field.endswith("*")]
    named = [f"{field}={word}" for field, word in zip(single, given)]
    left = given[len(single) :]
    if left and len(single) == len(fields):
        raise ConfigError(f"{verb} takes {' '.join(f.upper() for f in single)} and nothing more; {left[0]!r} is over.")
    if left:
        named.append(f"{fields[-1].removesuffix('*')}={left!r}")
    return [*named, *(arg for arg in args if arg not in given)]


def _told(found: Options, option: str, field: str, value: str | bool) -> Options:
    if getattr(found, field) != getattr(Options(), field):
        raise ConfigError(f"{option} is given twice; once is valid.")
    told: dict[str, Any] = {field: value}
    return replace(found, **told)


def _fields() -> dict[str, str]:
    return {**_WITH_VALUE, **{option: field for option, (field, _) in _FLAGS.items()}}
