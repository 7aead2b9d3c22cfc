"""``nemorun graft merge``: a base with adapters folded in, as an ordinary Hugging Face checkpoint."""

from typing import Optional

import typer

from graftwork.models.merging import merge_directory


def merge(
    adapter: str,
    output: str,
    base: Optional[str] = None,
    names: Optional[list[str]] = None,
    dtype: Optional[str] = None,
    check_base: bool = True,
    verify: bool = True,
) -> None:
    """Fold adapters into their base and write a Hugging Face checkpoint; one layer of it is in memory at a time.

    Args:
        adapter: Directory of adapters, of ours or of Hugging Face PEFT.
        output: Directory to write.
        base: Checkpoint of the base; default the one that the adapter names.
        names: Adapters of the directory; default all.
        dtype: ``bf16`` or ``fp32``; default the base's.
        check_base: Refuses a base that the adapter was not trained on.
        verify: Proves what was written before it is there.

    Raises:
        GraftworkError: as ``merge_directory`` does.
    """
    typer.echo(f"wrote {merge_directory(adapter, output, base, names, dtype, check_base, verify)}")
