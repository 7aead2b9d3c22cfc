"""The data of a recipe: files come from the user, sizes from the recipe."""

import nemo_run as run

from graftwork.data import SFTDataModule


def sft(seq_length: int, global_batch_size: int, micro_batch_size: int = 1, packing: bool = False) -> run.Config:
    """Return configured fine-tuning data without files: ``data.train=FILE`` and ``data.validation=FILE`` name them."""
    return run.Config(
        SFTDataModule,
        train=None,
        validation=None,
        seq_length=seq_length,
        micro_batch_size=micro_batch_size,
        global_batch_size=global_batch_size,
        packing=packing,
    )
