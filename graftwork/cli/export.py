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
    """Write the adapters in directory ``adapter`` (default all) to ``output``; no model is built, nothing is trained.

    ``for_``: ``peft`` or ``vllm``. ``base``: what the base is called where it is loaded; of a checkpoint that is here,
    its tokenizer tells whether rows begin with BOS. ``experts`` of a mixture: ``parameters`` (of transformers 5) or
    ``modules``; default the reader's. ``verify``: whether what was written is proved before it is there, on the base,
    if it is here. Raises ConfigError, ArtifactError or CheckpointError as
    ``model.export_adapters`` does.
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
