"""The tokenizer of a checkpoint directory."""

from pathlib import Path
from typing import TYPE_CHECKING

from graftwork.errors import CheckpointError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

FILES = ("tokenizer.json", "tokenizer.model", "vocab.json")


def load_tokenizer(directory: str | Path) -> "PreTrainedTokenizerFast":
    """Return the fast tokenizer of ``directory``, read from its files only.

    Raises CheckpointError when there are none, or they cannot be read.
    """
    folder = Path(directory)
    if not any((folder / name).is_file() for name in FILES):
        raise CheckpointError(f"{str(folder)!r} has no tokenizer; one of {', '.join(FILES)} is needed.")
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, use_fast=True, local_files_only=True)
    except (OSError, ValueError, ImportError, KeyError) as error:
        reason = str(error).strip().splitlines()[0].rstrip(".")
        raise CheckpointError(f"the tokenizer of {str(folder)!r} cannot be read: {reason}.") from error
    if not tokenizer.is_fast:
        raise CheckpointError(f"the tokenizer of {str(folder)!r} has no fast form; a tokenizer.json is needed.")
    return tokenizer
