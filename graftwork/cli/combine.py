"""``nemorun graft combine``: one adapter, or one merged model, of several adapters and weights."""

from typing import Optional

import typer

from graftwork.errors import ConfigError
from graftwork.models.merging import Blend, combine_directories, merge_combined


def combine(
    adapters: list[str],
    weights: list[float],
    output: str,
    combine: str = "cat",
    rank: Optional[int] = None,
    names: Optional[list[str]] = None,
    name: Optional[str] = None,
    base: Optional[str] = None,
    merged: bool = False,
    dtype: Optional[str] = None,
    verify: bool = True,
) -> None:
    """Write the weighted combination of adapters to ``output``: an adapter, or with ``merged`` the model with it.

    ``combine``: ``cat``, ``svd`` (to ``rank``) or ``linear``; ``names``: which adapter of each directory; ``name``: of
    the result; ``base``: the checkpoint, ``dtype``: that of a merged model; ``verify``: whether what was
    written is proved before it is there. Raises as ``combine_directories`` and
    ``merge_combined`` do.
    """
    blend = Blend(weights, combine, rank, names, name)
    if merged:
        typer.echo(f"wrote {merge_combined(adapters, output, blend, base, dtype, verify)}")
        return
    if dtype is not None:
        raise ConfigError(f"dtype={dtype!r} counts only with merged=True; an adapter is written in fp32.")
    typer.echo(f"wrote {combine_directories(adapters, output, blend, base, verify)}")
