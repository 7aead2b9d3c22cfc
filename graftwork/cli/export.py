"""``nemorun graft export``: adapters of a run as directories that Hugging Face PEFT or vLLM load."""

from typing import Optional

import typer

from graftwork.data.tokenizer import TextEncoder, checkpoint_tokenizer
from graftwork.errors import CheckpointError
from graftwork.models.exchange.directory import export_directory
from graftwork.models.exchange.export import Wanted
from graftwork.models.weights.hub import resolve


def export(
    adapter: str,
    output: str,
    for_: str = "peft",
    names: Optional[list[str]] = None,
    base: Optional[str] = None,
    experts: Optional[str] = None,
    verify: bool = True,
) -> None:
    """Write adapters as Hugging Face PEFT or vLLM load them; no model is built, nothing is trained.

    Args:
        adapter: Directory of adapters.
        output: Directory to write.
        for_: Who reads it: ``peft`` or ``vllm``.
        names: Adapters of the directory; default all.
        base: What the base is called where it is loaded; of one that is here, its tokenizer tells of BOS.
        experts: Of a mixture: ``parameters`` (of transformers 5) or ``modules``; default the reader's.
        verify: Proves, on the base if it is here, what was written before it is there.

    Raises:
        GraftworkError: as ``model.export_adapters`` does.
    """

    def bos() -> bool | None:
        if base is None:
            return None
        try:
            tokenizer = checkpoint_tokenizer(resolve(base))
        except CheckpointError:  # a name of what is elsewhere
            return None
        return TextEncoder(tokenizer, add_eos=False).add_bos

    for written in export_directory(adapter, output, Wanted("peft", for_, names, base, experts), bos, verify):
        typer.echo(f"wrote {written}")
