"""Supervised fine-tuning data: files to tokenised, padded or packed step batches."""

from graftwork.data.encoder import PROMPT_FORMAT, RowEncoder
from graftwork.data.schema import Place, parse_row
from graftwork.data.sft import SFTDataModule

__all__ = ["PROMPT_FORMAT", "Place", "RowEncoder", "SFTDataModule", "parse_row"]
