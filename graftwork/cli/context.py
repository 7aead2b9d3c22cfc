"""NeMo Run's command context with an honest end: one line per user error, an exit code, checked launches."""

import json
import logging
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import ClassVar

import fiddle as fdl
import nemo_run as run
import typer

from graftwork.cli.arguments import Options, own_options, words_as_fields
from graftwork.cli.overrides import PARSE_ERRORS, Maker, explain_executor, explain_overrides, factories, stack_as_list
from graftwork.cli.recipe_file import check_recipe_files
from graftwork.errors import ConfigError, GraftworkError, LaunchError, TrainingError, quoted
from graftwork.executors import launch, local
from graftwork.recipes.show import show, with_text
from graftwork.training import finetune

BAD_INPUT, FAILED_RUN = 2, 1


class GraftContext(run.cli.RunContext):
    """For ``run.cli.entrypoint(run_ctx_cls=...)``: parse as NeMo Run does, then run, check, and exit by the result."""

    options = Options()
    takes: ClassVar[tuple[str, ...]] = ("profile", "plan", "file", "from_adapter")
    """The fields of ``Options`` that a verb with a recipe accepts; one without a recipe accepts none."""

    def cli_execute(self, fn: Maker, args: list[str], entrypoint_type: str = "task") -> None:
        """Run ``fn`` with overrides ``args``; exits 2 on bad input and 1 on a failed run."""
        with one_line_errors():
            self.options, args = own_options(args, self.takes if fn is finetune else ())
            args = words_as_fields(fn.__name__, args)
            check_recipe_files(self.yaml, self.factory, args)
            own = [a for a in args if a.startswith("run.")]
            task_args = stack_as_list([a for a in args if a not in own])
            if self.to_yaml or self.to_toml or self.to_json:
                with parsing(lambda: explain_overrides(fn, self.factory, task_args)):
                    super().cli_execute(fn, own + task_args, entrypoint_type)
                return
            with parsing(lambda: explain_executor(own)):
                self.parse_args([a.removeprefix("run.") for a in own])
            with parsing(lambda: explain_overrides(fn, self.factory, task_args)):
                task = self.parse_fn(fn, task_args)
            self.execute(task)

    def execute(self, task: run.Partial) -> None:
        """Show, confirm, and run one configured verb here or on the executor."""
        check_complete(task)
        if self.dryrun:
            fdl.build(task)  # every constructor checks its own values
            typer.echo(show(task))
            return
        self.confirm(task)
        quiet_lightning()
        executor = self.executor or executor_for(task)
        if self.direct or executor is None:
            tell(fdl.build(with_text(task))())
        else:
            check_output(task)
            launch(task, executor, name=self.name, wait=not self.detach, plugins=self.plugins)

    def confirm(self, task: run.Partial) -> None:
        """Ask before a training; without a terminal the answer must be ``--yes``."""
        if self.skip_confirmation or not hasattr(task, "trainer"):
            return
        typer.echo(show(task))
        if not sys.stdin.isatty():
            raise ConfigError("nobody can answer 'Continue?' here; add --yes to run, or --dryrun to only look.")
        if not typer.confirm("Continue?"):
            raise SystemExit(0)


def executor_for(task: run.Partial) -> run.Executor | None:
    """Return the executor a recipe needs when none was named: none for one process, torchrun for several."""
    trainer = getattr(task, "trainer", None)
    devices, nodes = getattr(trainer, "devices", 1), getattr(trainer, "num_nodes", 1)
    if nodes != 1:
        raise ConfigError(f"trainer.num_nodes={nodes} needs an executor that reaches {nodes} machines; none was named.")
    ranks = count_devices(devices)
    return local(ntasks=ranks) if ranks > 1 else None


def count_devices(devices: object) -> int:
    """Return how many processes Lightning's ``devices`` means; the command line hands ``2`` over as text."""
    if isinstance(devices, list):
        return len(devices)
    return int(str(devices)) if str(devices).isdigit() else 1


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


def quiet_lightning() -> None:
    """Silence what Lightning announces on every start: devices, process groups, adverts."""
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)


def tell(result: object) -> None:
    """Print what a verb returned: rows as one JSON object a line, figures as one indented object."""
    if isinstance(result, list):
        for row in result:
            typer.echo(json.dumps(row, ensure_ascii=False))
    elif isinstance(result, dict):
        typer.echo(json.dumps(result, indent=2, ensure_ascii=False))


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
    """Print a GraftworkError as ``error: ...`` on stderr and exit; other exceptions pass."""
    # NeMo Run's parser logs each error before raising it; the raised one is printed here.
    logging.getLogger("nemo_run.cli.cli_parser").setLevel(logging.CRITICAL)
    try:
        yield
    except GraftworkError as error:
        sentence = str(error).split("\n\nFiddle context", 1)[0]
        typer.echo(f"error: {sentence}", err=True)
        raise SystemExit(FAILED_RUN if isinstance(error, LaunchError | TrainingError) else BAD_INPUT) from error
