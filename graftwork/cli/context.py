"""NeMo Run's command context with an honest end: one line per user error, an exit code, checked launches."""

import logging
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import ClassVar, Optional

import nemo_run as run
import typer

from graftwork.cli import heap
from graftwork.cli.arguments import Options, own_options, words_as_fields
from graftwork.cli.overrides import (
    PARSE_ERRORS,
    Maker,
    explain_executor,
    explain_fields,
    explain_overrides,
    factories,
    stack_as_list,
)
from graftwork.cli.recipe_file import check_recipe_files
from graftwork.endings import stoppable
from graftwork.errors import ConfigError, GraftworkError, quoted, where_to_read
from graftwork.executors import launch, local
from graftwork.executors.cluster.profile import read_profile
from graftwork.executors.placing.placement import check_placement, wanted
from graftwork.executors.process.here import build, check_values
from graftwork.executors.process.task import exit_code, quiet_lightning, sentence, tell
from graftwork.executors.submission.script import script_of
from graftwork.recipes import files
from graftwork.recipes.planning import outlook, refuse_problems
from graftwork.recipes.show import diff, show, with_changes, with_text
from graftwork.training import finetune


class GraftContext(run.cli.RunContext):
    """For ``run.cli.entrypoint(run_ctx_cls=...)``: parse as NeMo Run does, then run, check, and exit by the result."""

    options = Options()
    takes: ClassVar[tuple[str, ...]] = ("profile", "plan", "whole", "file", "from_adapter")
    """The fields of ``Options`` that a verb with a recipe accepts; one without a recipe accepts none."""

    words: ClassVar[Optional[str]] = None
    """The verb whose bare words are taken, where it is not the one that is configured."""

    def cli_execute(self, fn: Maker, args: list[str], entrypoint_type: str = "task") -> None:
        """Run ``fn`` with overrides ``args``; exits 2 on bad input and 1 on a failed run."""
        heap.started()
        with stoppable(), one_line_errors():
            self.options, args = own_options(args, self.takes if fn is finetune else ())
            args = words_as_fields(self.words or fn.__name__, args)
            check_recipe_files(self.yaml, self.factory, args)
            own = with_profile([a for a in args if a.startswith("run.")], self.options.profile)
            task_args = stack_as_list([a for a in args if not a.startswith("run.")])
            if self.to_yaml or self.to_toml or self.to_json:
                with parsing(lambda: explain_overrides(fn, self.factory, task_args)):
                    super().cli_execute(fn, own + task_args, entrypoint_type)
                return
            with parsing(lambda: explain_executor(own)):
                self.parse_args([a.removeprefix("run.") for a in own])
            self.execute(self.configured(fn, task_args))

    def configured(self, fn: Maker, args: list[str]) -> run.Partial:
        """Return what ``args`` make of the recipe: a named one, or the one that a file or an adapter holds."""
        written = self.written()
        if written is None:
            with parsing(lambda: explain_overrides(fn, self.factory, args)):
                return self.parse_fn(fn, args)
        with parsing(lambda: explain_fields(written, args)):
            return run.cli.parse_cli_args(written, args)

    def written(self) -> run.Partial | None:
        """Return the recipe of ``--file`` or ``--from-adapter``, None without; raises ConfigError for two recipes."""
        given = {
            "--factory": self.factory,
            "--file": self.options.file,
            "--from-adapter": self.options.from_adapter,
        }
        if len(named := [option for option, value in given.items() if value]) > 1:
            raise ConfigError(f"{' and '.join(named)} name a recipe each; one of them is valid.")
        if self.options.file:
            return files.load(self.options.file)
        return files.from_adapter(self.options.from_adapter) if self.options.from_adapter else None

    def execute(self, task: run.Partial) -> None:
        """Show, confirm, and run one configured verb here or on the executor."""
        check_complete(task)
        if self.executor is not None or not self.dryrun or wanted(task)[0] == 1:  # several nodes: of a machine unnamed
            check_placement(task, self.executor)
        quiet_lightning()
        if self.dryrun:
            check_values(task)
            typer.echo(show(task))
            if self.executor is not None:
                typer.echo("\n" + script_of(task, self.executor, self.name))
            return
        self.plan([task])
        self.confirm(task)
        executor = self.executor or executor_for(task)
        if self.direct or executor is None:
            tell(build(with_text(self.carrying(task)))())
        else:
            check_output(task)
            identity = launch(self.carrying(task), executor, name=self.name, wait=not self.detach, plugins=self.plugins)
            if self.detach:
                typer.echo(f"launched as {identity}; look with: nemorun graft status|logs|attach|cancel {identity}")

    def plan(self, tasks: Sequence[run.Partial]) -> None:
        """Refuse trainings that would leave this machine and cannot work; ``--no-plan`` sends them unseen."""
        if not self.options.plan or self.executor is None or isinstance(self.executor, run.LocalExecutor):
            return
        for task in tasks:
            if task.__fn_or_cls__ is finetune:
                refuse_problems(task)

    def confirm(self, task: run.Partial) -> None:
        """Ask before a training; without a terminal the answer must be ``--yes``."""
        if self.skip_confirmation or not hasattr(task, "trainer"):
            return
        typer.echo(show(task) if self.options.whole else self.changes(task))
        if task.__fn_or_cls__ is finetune and (line := outlook(task)):
            typer.echo(line)
        if not sys.stdin.isatty():
            raise ConfigError("nobody can answer 'Continue?' here; add --yes to run, or --dryrun to only look.")
        if not typer.confirm("Continue?"):
            raise SystemExit(0)

    def changes(self, task: run.Partial) -> str:
        """Return what was set beside what the recipe says by itself, for people who are asked."""
        found = self.difference(task)
        return f"changed, of the recipe (--all shows every field):\n{found}" if found else "the recipe as it is."

    def difference(self, task: run.Partial) -> str:
        """Return what was set beside what the recipe says by itself, each line as ``diff`` has it."""
        usual = self.written()
        return diff(self.parse_fn(task.__fn_or_cls__, []) if usual is None else usual, task)

    def carrying(self, task: run.Partial) -> run.Partial:
        """Return a training with what was set, which its report tells; other verbs as they are."""
        return with_changes(task, self.difference(task)) if task.__fn_or_cls__ is finetune else task


def with_profile(own: list[str], name: str | None) -> list[str]:
    """Return the ``run.*`` arguments with the profile of ``--profile``, and its executor where none is named."""
    if name is None:
        return own
    named = any(arg.startswith("run.executor=") for arg in own)
    executor = [] if named else [f"run.executor={read_profile(name).executor}"]
    return [*executor, *own, f"run.executor.profile={name}"]


def executor_for(task: run.Partial) -> run.Executor | None:
    """Return the executor a recipe needs when none was named: none for one process, torchrun for several."""
    _, ranks = wanted(task)
    return local(ntasks=ranks) if ranks > 1 else None


def check_complete(task: run.Partial) -> None:
    """Raise ConfigError when arguments without a default are still unset."""
    names = [p.name for p in task.__signature_info__.parameters.values() if p.default is p.empty]
    missing = [n for n in names if n not in task.__arguments__]
    if missing:
        recipes = sorted(factories(task.__fn_or_cls__))
        hint = f" or choose a recipe with --factory: {', '.join(recipes)}" if recipes else ""
        raise ConfigError(f"{task.__fn_or_cls__.__name__} needs {', '.join(missing)}: set {missing[0]}=...{hint}.")


def check_output(task: run.Partial) -> None:
    """Raise ConfigError when a task that returns its result would lose it in another process."""
    names = task.__signature_info__.parameters
    if "output" in names and not getattr(task, "output", None):
        raise ConfigError("set output=FILE: on an executor there is no terminal to print the result to.")


@contextmanager
def parsing(explain: Callable[[], str]) -> Iterator[None]:
    """Turn whatever NeMo Run's parser raises into a ConfigError with our sentence."""
    try:
        yield
    except PARSE_ERRORS as error:
        if isinstance(error, GraftworkError):
            raise
        raise ConfigError(explain() or quoted(" ".join(str(error).split()), 400, bare=True)) from error


@contextmanager
def one_line_errors() -> Iterator[None]:
    """Print a GraftworkError as ``error: ...`` on stderr and exit; other exceptions pass.

    People, not programs or logs, are told in a second line where to read on.
    """
    # NeMo Run's parser logs each error before raising it; the raised one is printed here.
    logging.getLogger("nemo_run.cli.cli_parser").setLevel(logging.CRITICAL)
    try:
        yield
    except GraftworkError as error:
        typer.echo(f"error: {sentence(error)}", err=True)
        if sys.stderr.isatty():
            typer.echo(f"see: {where_to_read(error)}", err=True)
        raise SystemExit(exit_code(error)) from error
