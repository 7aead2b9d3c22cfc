"""Rows to learn from: files to tokenised, padded or packed step batches. What a model does with a batch, no."""

from graftwork.data.encoder import PROMPT_FORMAT, RowEncoder
from graftwork.data.schema import Place, parse_row
from graftwork.data.sft import SFTDataModule
from graftwork.data.tokenizer import Tokenizer

__all__ = ["PROMPT_FORMAT", "Place", "RowEncoder", "SFTDataModule", "Tokenizer", "parse_row"]
