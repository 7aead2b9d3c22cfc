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
    """Write the weighted combination of adapters: an adapter, or the model with it.

    Args:
        adapters: Directories of adapters.
        weights: A number for each of them.
        output: Directory to write.
        combine: ``cat`` (exact, ranks add up), ``svd`` (nearest of a rank) or ``linear`` (of the factors).
        rank: Rank of the result of ``svd``.
        names: Which adapter of each directory.
        name: Name of the result.
        base: Checkpoint of the base; default the one that the adapters name.
        merged: Writes the model with the combination in place of an adapter.
        dtype: ``bf16`` or ``fp32`` of a merged model; default the base's.
        verify: Proves what was written before it is there.

    Raises:
        GraftworkError: as ``combine_directories`` and ``merge_combined`` do.
    """
    blend = Blend(weights, combine, rank, names, name)
    if merged:
        typer.echo(f"wrote {merge_combined(adapters, output, blend, base, dtype, verify)}")
        return
    if dtype is not None:
        raise ConfigError(f"dtype={dtype!r} counts only with merged=True; an adapter is written in fp32.")
    typer.echo(f"wrote {combine_directories(adapters, output, blend, base, verify)}")
