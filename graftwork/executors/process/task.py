"""What runs inside a launched process: a recipe, its result, one line for an error, and an eye on the parent."""

import json
import logging
import os
import re
import signal
import threading
import time
import warnings
from contextlib import suppress
from pathlib import Path

import nemo_run as run
import typer
from fiddle.experimental import serialization

from graftwork.endings import say, stoppable
from graftwork.errors import ConfigError, GraftworkError, LaunchError, TrainingError, quoted
from graftwork.executors.process import life_line
from graftwork.executors.process.here import build
from graftwork.recipes.show import show, with_text

BAD_INPUT, FAILED_RUN = 2, 1
"""Exit codes of a user's error: in what was asked for, and in the run itself."""

LAUNCHER = "GRAFTWORK_LAUNCHER"
"""Environment variable that names the ``nemorun`` or script that waits for a task on this machine.

Its process id, or the file of its life line: a container sees no processes of others.
"""

CRASHED = re.compile(r"graftwork: rank (\d+) crashed: (.+)$")
"""The line in which a rank tells at once of an error that nobody expects: those of its peers are its consequences."""

GRACE_SECONDS = 60.0
"""How long a task whose launcher has died may take to save its state."""

_EVERY_SECONDS = 0.5


def as_task(recipe: run.Partial) -> run.Partial:
    """Return a task that performs ``recipe``; raises ConfigError when it cannot be written down.

    The recipe travels as text: it is built where its errors are caught, and read only once the parent is watched.
    """
    try:
        text = serialization.dump_json(with_text(recipe))
        unchanged = serialization.load_json(text) == with_text(recipe)
    except (serialization.UnserializableValueError, serialization.PyrefPolicyError) as error:
        raise ConfigError(
            f"the recipe cannot be sent to another process: {quoted(str(error), 300, bare=True)}"
        ) from error
    if not unchanged:
        raise ConfigError("the recipe holds an object that cannot be sent to another process; wrap it in run.Config.")
    return run.Partial(perform, recipe=text, shown=show(recipe).splitlines())


def perform(recipe: str, shown: list[str]) -> None:
    """Run a serialised recipe in this process and print its result from rank 0; ``shown`` is for whoever reads the job.

    Exits as the command line does: 2 for bad input, 1 for a failed run, 75, 130 or 143 when it was asked to stop.
    """
    watch_parents()
    with stoppable():
        try:
            task = serialization.load_json(recipe)
            quiet_lightning()  # its import, which the recipe is the reason for, makes it talk
            result = build(task)()
        except GraftworkError as error:
            # torchrun and launch read it: the kind, then the sentence, as the last line of a traceback would have it
            say(f"{type(error).__module__}.{type(error).__qualname__}: {' '.join(sentence(error).split())}")
            raise SystemExit(exit_code(error)) from error
        except Exception as error:
            say(f"graftwork: rank {_rank()} crashed: {type(error).__name__}: {' '.join(str(error).split())}")
            raise
    if _rank() == "0":
        tell(result)


def _rank() -> str:
    return os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0"))


def exit_code(error: GraftworkError) -> int:
    """Return the exit code of a user's error."""
    return FAILED_RUN if isinstance(error, LaunchError | TrainingError) else BAD_INPUT


def sentence(error: GraftworkError) -> str:
    """Return what an error says, without the place in the recipe that Fiddle adds."""
    return str(error).split("\n\nFiddle context", 1)[0]


def quiet_lightning() -> None:
    """Silence what Lightning announces on every start: devices, process groups, adverts, a Slurm that is not used."""
    warnings.filterwarnings("ignore", message="The `srun` command is available on your system but is not used")
    # megatron-core calls it; nobody who trains can change that
    warnings.filterwarnings("ignore", message="`torch.distributed.all_gather_into_tensor` is deprecated")
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)


def tell(result: object) -> None:
    """Print what a verb returned: rows as one JSON object a line, figures as one indented object."""
    if isinstance(result, list):
        for row in result:
            typer.echo(json.dumps(row, ensure_ascii=False))
    elif isinstance(result, dict):
        typer.echo(json.dumps(result, indent=2, ensure_ascii=False))


def watch_parents() -> None:
    """Let this process not survive those that started it, from another thread.

    When torchrun has died nobody collects the rank any more: it is killed. When the launcher has died the state can
    still be saved: the process is asked to stop, and killed after a grace.
    """
    launcher = os.environ.get(LAUNCHER, "")
    if "TORCHELASTIC_RUN_ID" in os.environ or launcher:
        threading.Thread(target=_watch, args=(os.getppid(), launcher), daemon=True).start()


def _watch(parent: int, launcher: str) -> None:
    heard = 0
    while True:
        if launcher and not _lives(launcher):
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(GRACE_SECONDS)
            break
        if os.getppid() != parent and str(parent) != launcher:
            break
        if os.path.isabs(launcher):
            numbers = life_line.passed_on(Path(launcher))[heard:]
            heard += len(numbers)
            for number in numbers:
                os.kill(os.getpid(), number)
        time.sleep(_EVERY_SECONDS)
    os.kill(os.getpid(), signal.SIGKILL)


def _lives(launcher: str) -> bool:
    return life_line.is_held(Path(launcher)) if os.path.isabs(launcher) else alive(int(launcher))


def alive(process: int) -> bool:
    """Whether a process runs; one that has ended and was not yet collected does not."""
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    with suppress(OSError, IndexError):
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    return True
