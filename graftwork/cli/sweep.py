"""``nemorun graft sweep``: a recipe with lists of values for some of its fields, ``sweep.optim.lr=[1e-4,1e-3]``."""

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Optional

import nemo_run as run
import typer

from graftwork.cli.context import GraftContext, check_complete, one_line_errors, parsing
from graftwork.cli.overrides import Maker, explain_fields, stack_as_list
from graftwork.cli.recipe_file import check_recipe_files
from graftwork.errors import ConfigError, GraftworkError, LaunchError, quoted
from graftwork.executors.process.here import check_values
from graftwork.executors.process.task import quiet_lightning
from graftwork.executors.submission.script import script_of, script_of_array
from graftwork.executors.sweep import sweep as launch_sweep
from graftwork.recipes import show
from graftwork.recipes.grid import grid
from graftwork.recipes.paths import follow
from graftwork.training import finetune
from graftwork.training.leaderboard import leaderboard, ranked, read_runs

AXIS = "sweep."
PARALLEL = "parallel="

_OPENED, _CLOSED = "([{", ")]}"


def sweep(parallel: Optional[int] = None) -> None:
    """Say what the verb takes beside a recipe; ``SweepContext`` does what it stands for.

    Args:
        parallel: Runs at the same time; default one here, all of them on a cluster.
    """
    raise ConfigError(f"a sweep is run by nemorun graft sweep, or in Python by executors.sweep (parallel={parallel}).")


class SweepContext(GraftContext):
    """Parses the rest as ``finetune`` does, makes the grid, and runs it as one experiment."""

    axes: Sequence[str] = ()
    parallel: Optional[int] = None

    def cli_execute(self, fn: Maker, args: list[str], entrypoint_type: str = "task") -> None:
        """Take the axes and ``parallel`` out of ``args``; the others are those of ``finetune``."""
        with one_line_errors():
            self.axes = [arg.removeprefix(AXIS) for arg in args if arg.startswith(AXIS)]
            self.parallel = _number([arg for arg in args if arg.startswith(PARALLEL)])
            if not self.axes:
                raise ConfigError("a sweep needs a field with values, for example sweep.optim.lr=[1e-4,1e-3].")
        rest = [arg for arg in args if not arg.startswith((AXIS, PARALLEL))]
        super().cli_execute(finetune, rest, entrypoint_type)

    def execute(self, task: run.Partial) -> None:
        """Show the runs, confirm, run them, and print their leaderboard."""
        check_complete(task)
        quiet_lightning()
        recipes = grid(task, self._values(task))
        name = self.name if self.name and self.name != finetune.__name__ else "sweep"
        for recipe in recipes:
            check_values(recipe)
        if self.dryrun:
            typer.echo(show(task))
            typer.echo(_listed(recipes))
            if self.executor is not None:
                typer.echo("\n" + self._script(recipes, name))
            return
        typer.echo(_listed(recipes))
        self.plan(recipes)
        self.confirm(task)
        try:
            launch_sweep(recipes, self.executor, name, self.parallel, wait=not self.detach)
        except LaunchError:
            _tell_results(recipes)
            raise
        _tell_results(recipes)

    def _script(self, recipes: Sequence[run.Partial], name: str) -> str:
        """Return what is submitted: one job array, or the first of as many commands as there are runs."""
        if isinstance(self.executor, run.SlurmExecutor):
            return script_of_array(recipes, self.executor, name, self.parallel)
        assert self.executor is not None
        first = Path(recipes[0].trainer.default_root_dir).name
        return f"{first}, and the others likewise:\n{script_of(recipes[0], self.executor, name)}"

    def _values(self, task: run.Partial) -> dict[str, list[object]]:
        """Return the values of every axis as NeMo Run reads them, each axis on the first values of those before it."""
        axes: dict[str, list[object]] = {}
        so_far = copy.deepcopy(task)
        for axis in self.axes:
            path, equals, values = axis.partition("=")
            if not equals or not values.startswith("[") or not values.endswith("]"):
                raise ConfigError(f"{AXIS}{axis} is no axis; write {AXIS}FIELD=[VALUE,VALUE].")
            if path in axes:
                raise ConfigError(f"{AXIS}{path} is given twice; once is valid.")
            given = [_with(so_far, path, value) for value in split_values(values[1:-1])]
            axes[path] = [_at(changed, path) for changed in given]
            so_far = given[0] if given else so_far
        return axes


def split_values(text: str) -> list[str]:
    """Split ``8, lora(dim=8), "a,b"`` at the commas outside of brackets and quotes."""
    parts, depth, quote = [""], 0, ""
    for char in text:
        if quote:
            quote = "" if char == quote else quote
        elif char in "\"'":
            quote = char
        depth += 0 if quote else (char in _OPENED) - (char in _CLOSED)
        if char == "," and not depth and not quote:
            parts.append("")
        else:
            parts[-1] += char
    return [part.strip() for part in parts if part.strip()]


def _with(task: run.Partial, path: str, value: str) -> run.Partial:
    args = stack_as_list([f"{path}={value}"])
    check_recipe_files(None, None, args)
    changed = copy.deepcopy(task)
    with parsing(lambda: explain_fields(task, args)):
        return run.cli.parse_cli_args(changed, args)


def _at(task: run.Partial, path: str) -> object:
    owner, field, reason = follow(task, path)
    if reason:
        raise ConfigError(reason)
    return owner[int(field)] if isinstance(owner, list) else getattr(owner, field)


def _number(given: Sequence[str]) -> Optional[int]:
    if not given:
        return None
    value = given[-1].removeprefix(PARALLEL)
    if not value.isdigit() or int(value) == 0:
        raise ConfigError(f"parallel={quoted(value)} is no number of runs; 1 and more are valid.")
    return int(value)


def _listed(recipes: Sequence[run.Partial]) -> str:
    paths = [Path(recipe.trainer.default_root_dir) for recipe in recipes]
    return "\n".join([f"{len(paths)} runs below {paths[0].parent}:", *(f"  {path.name}" for path in paths)])


def _tell_results(recipes: Sequence[run.Partial]) -> None:
    """Print the leaderboard of the runs that have a directory here."""
    there = [path for recipe in recipes if (path := Path(recipe.trainer.default_root_dir)).is_dir()]
    try:
        runs = read_runs([str(path) for path in there])
    except GraftworkError:
        return  # the runs are on another machine, or have not begun
    typer.echo("\n" + leaderboard(ranked(runs)), nl=False)
