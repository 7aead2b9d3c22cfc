"""``nemorun graft data``: what data files hold and what becomes of their rows, before anything is trained."""

import inspect
import os
import sys
from typing import ClassVar, Optional

import nemo_run as run
import typer

from graftwork.atomic import atomic_write_bytes
from graftwork.cli.context import GraftContext
from graftwork.cli.overrides import Maker
from graftwork.data import SFTDataModule
from graftwork.errors import ConfigError
from graftwork.executors.process.task import BAD_INPUT
from graftwork.planning.inspection import MOST, SHOWN
from graftwork.planning.inspection_text import as_text, histogram
from graftwork.recipes.planning import inspected
from graftwork.recipes.show import show
from graftwork.training import finetune

DEFAULT = "smollm2_135m"
"""The recipe whose tokenizer and lengths are used where none is named."""

FIELDS, PARTS = (frozenset(inspect.signature(one).parameters) for one in (SFTDataModule, finetune))
"""Fields of the data, and of the whole recipe."""


def data(train: str, output: Optional[str] = None, limit: int = MOST, rows: int = SHOWN) -> None:
    """Say what the verb takes beside a recipe; ``DataContext`` does what it stands for.

    Args:
        train: File of rows to learn from; other fields of the data may leave out their ``data.`` too.
        output: PNG file to draw the lengths into.
        limit: Most rows of a file that are looked at.
        rows: Rows that are shown as they are learned.
    """
    raise ConfigError(
        "data are looked at by nemorun graft data, or in Python by planning.inspection.inspect "
        f"(train={train}, output={output}, limit={limit}, rows={rows})."
    )


class DataContext(GraftContext):
    """Parses the rest as ``finetune`` does, fields of the data without ``data.`` too, and looks at the rows."""

    takes: ClassVar[tuple[str, ...]] = ("file", "from_adapter")
    words: ClassVar[Optional[str]] = "data"
    factory: Optional[str]
    output: Optional[str] = None
    limit: int = MOST
    rows: int = SHOWN

    def cli_execute(self, fn: Maker, args: list[str], entrypoint_type: str = "task") -> None:
        """Take the verb's own arguments out of ``args``; the others are those of ``finetune``."""
        super().cli_execute(finetune, args, entrypoint_type)

    def configured(self, fn: Maker, args: list[str]) -> run.Partial:
        """Return the recipe, the default one where none is named, with the data that ``args`` name."""
        rest = []
        for arg in args:
            name, equals, value = arg.partition("=")
            if name == "output" and equals:
                self.output = value
            elif name in ("limit", "rows") and equals:
                setattr(self, name, _number(name, value))
            else:
                rest.append(f"data.{arg}" if _is_of_data(name) and equals else arg)
        if self.written() is None:
            self.factory = self.factory or DEFAULT
        return super().configured(fn, rest)

    def execute(self, task: run.Partial) -> None:
        """Print what was found, draw it to ``output``; exits 2 where rows would stop a run."""
        if self.dryrun:
            typer.echo(show(task))
            return
        found = inspected(task, self.limit, self.rows)
        # typer.echo would take colours away again, by a rule of its own
        print(as_text(found, colour=sys.stdout.isatty() and not os.environ.get("NO_COLOR")), flush=True)
        if self.output:
            atomic_write_bytes(self.output, histogram(found))
            typer.echo(f"\nwritten: {self.output}")
        if found.problems:
            raise SystemExit(BAD_INPUT)


def _is_of_data(name: str) -> bool:
    """Whether a name is meant to be a field of the data: also one that is no field at all, which may be misspelt."""
    return name in FIELDS or (name.isidentifier() and name not in PARTS)


def _number(name: str, value: str) -> int:
    if not value.isdecimal() or (name == "limit" and int(value) < 1):
        raise ConfigError(f"{name}={value} is not valid: a whole number {'from 1 on' if name == 'limit' else ''}.")
    return int(value)
