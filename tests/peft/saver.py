"""A process that saves an artifact over and over until it is killed."""

import sys
from multiprocessing.connection import Connection
from pathlib import Path

import torch

from graftwork.peft.artifact import directory


def tensors(value: float) -> dict[str, torch.Tensor]:
    """Return the tensors of the artifact whose every value is ``value``."""
    return {f"lora.x{i}": torch.full((64, 1024), value) for i in range(8)}


def save_for_ever(path: Path, config: dict[str, object], ready: Connection) -> None:
    """Save artifacts of value 1, 2, 3, ... to ``path``; tell when the first one is there."""
    torch.set_num_threads(1)
    value = 0.0
    while True:
        value += 1
        with directory._staged(path, tensors(value), config) as files:
            files.finish(tensors(value), None, directory.plain_card)
        if value == 1:
            ready.send(True)
            ready.close()


if __name__ == "__main__":
    sys.exit("a test starts this")
