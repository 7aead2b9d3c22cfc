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
    """Fold the adapters in directory ``adapter`` (default all) into their base and write it to ``output``.

    ``adapter``: of ours, or of Hugging Face PEFT. ``base``: the checkpoint, default the one that the adapter names.
    ``dtype``: ``bf16`` or ``fp32``, default the base's. ``verify``: whether what was written is proved before it is
    there. One layer of the base is in memory at a time. Raises as ``merge_directory`` does.
    """
    typer.echo(f"wrote {merge_directory(adapter, output, base, names, dtype, check_base, verify)}")
