"""``nemorun graft verify``: the proof that an adapter, an export or a merged model carries, run again."""

from collections.abc import Sequence
from typing import Optional

import typer

from graftwork.executors.process.task import FAILED_RUN
from graftwork.inference.verify import verify_directory
from graftwork.models.proof import Compared


def verify(
    directory: str,
    base: Optional[str] = None,
    against: Optional[str] = None,
    client: str = "graftwork",
    dtype: Optional[str] = None,
) -> None:
    """Run the probe that ``directory`` carries again and print how far the logits are from the proof's.

    ``directory``: an adapter, an exported one or a merged model; ``against``: another of these that is to answer in its
    place. ``base``: the checkpoint of an adapter, default the one that it names. ``client``: ``graftwork``, or
    ``transformers`` (with PEFT). ``dtype``: default that of the proof. Exits 1 where they differ by more than the
    tolerance. Raises as ``verify_directory`` does.
    """
    found = verify_directory(directory, base, against, client, dtype)
    typer.echo(found.what)
    typer.echo(_table(found.rows))
    if not found.ok:
        raise SystemExit(FAILED_RUN)


def _table(found: Sequence[Compared]) -> str:
    names = [" + ".join(one.adapters) or "the base" for one in found]
    width = max(len(name) for name in [*names, "logits of"])
    lines = [f"{'logits of':<{width}}  {'furthest apart':>14}  {'tolerance':>9}  {'effect':>8}"]
    for name, one in zip(names, found):
        said = "ok, every bit" if one.ok and one.exact else "ok" if one.ok else "differs"
        effect = f"{one.effect:.1e}" if one.adapters else ""
        lines.append(f"{name:<{width}}  {one.difference:>14.1e}  {one.tolerance:>9.0e}  {effect:>8}  {said}")
    return "\n".join(lines)
