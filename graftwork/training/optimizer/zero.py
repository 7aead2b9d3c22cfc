"""ZeRO: torch's optimizers made to step on this rank's pieces of the parameters, with moments of nothing else.

Rajbhandari et al. 2020, arXiv 1910.02054. A piece lies on its parameter's memory; what other ranks step comes back with
``Bucket.gather``.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import nn
from torch.optim import Optimizer

from graftwork.errors import ConfigError
from graftwork.training.optimizer.bucket import Piece

ELEMENTWISE = (torch.optim.Adam, torch.optim.AdamW)
"""Optimizers that step every element from its own gradient, so that a piece steps as it would in the whole."""


def can_share(optimizer: Optimizer) -> bool:
    """Tell whether an optimizer steps pieces as it steps whole parameters."""
    return isinstance(optimizer, ELEMENTWISE)


def share_out(optimizers: Sequence[Optimizer], pieces: Mapping[nn.Parameter, Sequence[Piece]]) -> None:
    """Put this rank's ``pieces`` in the place of their parameters, in groups that keep names and settings.

    Raises ConfigError for an optimizer that looks at whole tensors.
    """
    for optimizer in optimizers if pieces else ():
        if not can_share(optimizer):
            names = ", ".join(one.__name__ for one in ELEMENTWISE)
            raise ConfigError(
                f"distributed_optimizer=True cannot share out {type(optimizer).__name__}, which may look at whole "
                f"tensors; valid: {names}, or distributed_optimizer=False."
            )
        for group in optimizer.param_groups:
            held = [pieces.get(p) for p in group["params"]]
            group["params"] = [
                one
                for p, found in zip(group["params"], held)
                for one in ([p] if found is None else [piece.parameter for piece in found])
            ]
