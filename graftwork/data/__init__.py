"""Rows to learn from: files to tokenised, padded or packed step batches. What a model does with a batch, no."""

from typing import TYPE_CHECKING

from graftwork.data.encoder import PROMPT_FORMAT, RowEncoder
from graftwork.data.schema import Place, parse_row
from graftwork.data.tokenizer import Tokenizer

if TYPE_CHECKING:
    from graftwork.data.sft import SFTDataModule

__all__ = ["PROMPT_FORMAT", "Place", "RowEncoder", "SFTDataModule", "Tokenizer", "parse_row"]


def __getattr__(name: str) -> object:
    """Load the data module when it is used: Lightning takes seconds, and processes that encode rows need none of it."""
    if name == "SFTDataModule":
        from graftwork.data.sft import SFTDataModule

        return SFTDataModule
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
