"""``nemorun graft plan``: what a recipe will take and what would stop it, and with ``--fit`` how it fits devices."""

from typing import ClassVar, Optional

import nemo_run as run
import typer

from graftwork.atomic import atomic_write_text
from graftwork.cli.context import GraftContext, check_complete
from graftwork.cli.overrides import Maker
from graftwork.errors import ConfigError
from graftwork.executors.process.task import BAD_INPUT
from graftwork.planning import advice
from graftwork.recipes.planning import fit
from graftwork.recipes.planning import plan as plan_recipe
from graftwork.recipes.show import show
from graftwork.training import finetune

OWN = ("device", "output")


def plan(device: Optional[str] = None, output: Optional[str] = None) -> None:
    """Say what the verb takes beside a recipe; ``PlanContext`` does what it stands for.

    Args:
        device: Device to plan for, such as ``H100``; default several.
        output: JSON file to write the plan to.
    """
    raise ConfigError(
        f"a plan is made by nemorun graft plan, or in Python by recipes.plan (device={device}, output={output})."
    )


class PlanContext(GraftContext):
    """Parses the rest as ``finetune`` does, and prints the plan instead of a run."""

    takes: ClassVar[tuple[str, ...]] = ("file", "from_adapter", "fit")
    device: Optional[str] = None
    output: Optional[str] = None

    def cli_execute(self, fn: Maker, args: list[str], entrypoint_type: str = "task") -> None:
        """Take ``device`` and ``output`` out of ``args``; the others are those of ``finetune``."""
        rest = []
        for arg in args:
            name, equals, value = arg.partition("=")
            if name in OWN and equals:
                setattr(self, name, value)
            else:
                rest.append(arg)
        super().cli_execute(finetune, rest, entrypoint_type)

    def execute(self, task: run.Partial) -> None:
        """Print the plan (and the advice), write it as JSON to ``output``; exits 2 where there are problems."""
        check_complete(task)
        if self.dryrun:
            typer.echo(show(task))
            return
        made = plan_recipe(task, [self.device]) if self.device else plan_recipe(task)
        typer.echo(str(made))
        if self.options.fit:
            world, device = advice.parse_fit(self.options.fit)
            typer.echo("\n" + advice.as_text(fit(task, self.options.fit), world, device))
        if self.output:
            atomic_write_text(self.output, made.to_json() + "\n")
        if made.problems:
            raise SystemExit(BAD_INPUT)
