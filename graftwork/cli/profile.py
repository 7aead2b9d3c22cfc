"""``nemorun graft profile``: write a file of cluster profiles, or try one out."""

from pathlib import Path
from typing import Optional

import typer

from graftwork.errors import ConfigError, LaunchError, quoted, suggest
from graftwork.executors.cluster.checkup import check_up
from graftwork.executors.cluster.profile import FILE, read_profile
from graftwork.executors.cluster.profile_text import write_profile

ACTIONS = ("init", "check")


def profile(action: str, name: Optional[str] = None) -> None:
    """Write a commented cluster.yaml here, or try a profile out and print a line for every finding.

    Args:
        action: ``init`` writes, ``check`` tries out.
        name: A profile, FILE.yaml or FILE.yaml:PROFILE; default the nearest one.

    Raises:
        LaunchError: when a check fails.
    """
    if action == "init":
        write_profile(Path(FILE))
        typer.echo(f"wrote {FILE}; fill it in, then: nemorun graft profile check")
    elif action == "check":
        _check(name)
    else:
        raise ConfigError(f"profile {quoted(action)}: there is no such action; {suggest(action, ACTIONS)}")


def _check(name: str | None) -> None:
    found = read_profile(name)
    typer.echo(f"profile {found.name!r} of {found.file}, for {found.executor}")
    failed = 0
    for finding in check_up(found):
        typer.echo(str(finding))
        failed += not finding.good
    if failed:
        raise LaunchError(f"profile {found.name!r}: {failed} of these failed.")
