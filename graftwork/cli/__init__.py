"""``nemorun graft VERB``: importing this module (NeMo Run's entry point does) registers verbs and factories.

Here belongs what is typed and printed. What a verb does stands in ``training`` and ``inference``.
"""

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from pkgutil import resolve_name
from typing import Any

import nemo_run as run
from nemo_run.cli import api

from graftwork.cli import heap
from graftwork.cli.help import GraftEntrypoint
from graftwork.cli.verbs import VERBS

NAMESPACE = "graft"


def register(arguments: Sequence[str]) -> None:
    """Register verbs and factories for a process with these ``arguments``.

    Help and the verbs beside the one that is asked for need names only: what they stand for takes seconds to import.
    """
    asked = [verb for verb in VERBS if _is_asked(verb.name, arguments)]
    if asked:
        from graftwork.cli import factories

        factories.register()
    for verb in VERBS:
        known = verb in asked
        function = resolve_name(verb.place) if known else _unread(verb.name)
        context = resolve_name(verb.context) if known else None
        run.cli.entrypoint(
            function, namespace=NAMESPACE, help=verb.does, entrypoint_cls=GraftEntrypoint, run_ctx_cls=context
        )


def _say(*words: object, **options: Any) -> None:
    """Print what NeMo Run's command line prints, without what it says first: a result may be read by a program."""
    if words != ("Configuring global options",):
        print(*words, **options)


def _is_asked(verb: str, arguments: Sequence[str]) -> bool:
    return Path(arguments[0]).name != "nemorun" or verb in arguments[2:]


def _unread(name: str) -> Callable[[], None]:
    def verb() -> None:
        raise RuntimeError(f"{name} is not imported in this process")

    verb.__name__ = verb.__qualname__ = name
    return verb


if Path(sys.argv[0]).name == "nemorun":
    heap.starting()
api.print = _say
register(sys.argv)
