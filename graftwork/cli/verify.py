"""``nemorun graft verify``: the proof that an adapter carries, run again on a base loaded anew."""

from collections.abc import Sequence
from pathlib import Path
from typing import Optional

import typer

from graftwork.executors.process.task import FAILED_RUN
from graftwork.models import load
from graftwork.models.merging.source import opened
from graftwork.models.proof import Compared
from graftwork.peft.artifact.directory import read_everywhere
from graftwork.peft.artifact.proof import read


def verify(adapter: str, base: Optional[str] = None, dtype: Optional[str] = None) -> None:
    """Run the probe of the adapter in directory ``adapter`` again and print how far its logits are from the proof's.

    ``base``: the checkpoint, default the one that the adapter names. ``dtype``: default that of the proof. Exits 1
    where they differ by more than the tolerance. Raises ArtifactError for an adapter without a proof, with a damaged
    one, or of another base; CheckpointError for a base that cannot be read.
    """
    proof = read(adapter, read_everywhere(adapter).checksum)
    with opened(adapter, base) as source:
        directory = source.directory
    assert directory is not None, "it was asked for"
    model = load(directory, dtype=dtype or proof.dtype)
    model.load_adapters(adapter, trainable=False)
    found = model.verify_adapters(adapter)
    typer.echo(f"{Path(adapter).name} on {source.base.name}, {len(proof.probe.prompts)} rows, {dtype or proof.dtype}")
    typer.echo(_table(found))
    if not all(one.ok for one in found):
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
