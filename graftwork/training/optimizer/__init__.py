"""The update of what trains: zero, accumulate, sum, scale, measure, clip, step, and its sharded state.

Here belongs all that knows gradients, torch's optimizers and their state. Not which files a training state has, nor
when anything is saved.
"""

from graftwork.training.optimizer.update import Update

__all__ = ["Update"]
