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
    """Run the probe that a directory carries again and print how far the logits are from the proof's.

    Exits 1 where they differ by more than the tolerance.

    Args:
        directory: An adapter, an exported one or a merged model.
        base: Checkpoint of the base; default the one that the adapter names.
        against: Another directory of these kinds, which answers the probe in place of the first.
        client: Who answers: ``graftwork``, or ``transformers`` (with PEFT).
        dtype: ``bf16`` or ``fp32``; default that of the proof.

    Raises:
        GraftworkError: as ``verify_directory`` does.
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
