"""The update: one object through which strategy and training state see gradients, optimizer and its state."""

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import torch.distributed as dist
from lightning.fabric.utilities.optimizer import _optimizers_to_device
from torch import Tensor, nn
from torch.optim import Optimizer

from graftwork.errors import ConfigError
from graftwork.parallel.sharded_files import State
from graftwork.training.optimizer import shards, zero
from graftwork.training.optimizer.bucket import Piece
from graftwork.training.optimizer.gradients import Gradients


class Update:
    """The update of what trains in this rank's model ``chunks``; how its state lies over the ranks is its own affair.

    The life of a fit: ``accumulate``, ``step_with`` the optimizers; then in every step ``zero``, the schedule's
    backward passes, ``finish``, ``clip`` and ``step``; ``release`` at the end. Weights can be filled and the state
    taken at any time. Methods that talk to other ranks must be called by all of them together.
    """

    def __init__(self, chunks: Sequence[nn.Module], optimizers: Sequence[Optimizer] = ()) -> None:
        self._chunks = chunks
        self._optimizers = optimizers
        self._gradients: Gradients | None = None
        self._pieces: dict[nn.Parameter, list[Piece]] = {}

    def accumulate(self, sharded: bool = False) -> None:
        """Sum gradients over microbatches from here on; ``sharded``: every data-parallel rank keeps its share only.

        Raises ConfigError when no rank has anything to train.
        """
        gradients = Gradients(self._chunks, sharded)
        count = torch.tensor(len(gradients.parameters), device=self._device)
        dist.all_reduce(count)
        if not int(count):
            raise ConfigError(
                "nothing to train: every parameter is frozen; give a peft stack, or none of it for full fine-tuning."
            )
        self._gradients, self._pieces = gradients, gradients.pieces()

    def step_with(self, optimizers: Sequence[Optimizer]) -> None:
        """Let ``optimizers``, built over what trains and before any step, make the steps: on shards if shared."""
        self._optimizers = optimizers
        zero.share_out(optimizers, self._pieces)
        _optimizers_to_device(optimizers, self._device)

    # ---- one step ------------------------------------------------------------------------------------------------

    def zero(self) -> None:
        """Forget the gradients of the last step."""
        self._accumulated.zero()

    def finish(self, tokens: Tensor) -> None:
        """Turn gradients of this rank's loss *sum* into those of the global batch's mean over ``tokens``; measure."""
        self._accumulated.finish(tokens)

    @property
    def norm(self) -> Tensor:
        """L2 norm of the whole model's gradient, as ``finish`` has measured it: before any clipping."""
        return self._accumulated.norm

    def norms(self) -> dict[str, Tensor]:
        """Return what each adapter, and ``base`` where it trains, has of the norm, by name."""
        return dict(self._accumulated.norms)

    def clip(self, limit: float) -> None:
        """Scale the gradients so that their global norm is at most ``limit``."""
        self._accumulated.clip(limit)

    def clip_values(self, limit: float) -> None:
        """Clamp every element of the gradients to [-limit, limit]."""
        self._accumulated.clip_values(limit)

    def step(self, optimizer: Optimizer, closure: Callable[[], float]) -> float:
        """Call ``closure``, which makes the gradients, and let ``optimizer`` step; return what the closure returns."""
        loss = optimizer.step(closure)
        self._accumulated.gather()
        return loss

    def gradient_of(self, parameter: nn.Parameter) -> list[Tensor]:
        """Return what this rank holds of a trained parameter's gradient: all of it, or flat pieces, or none."""
        return self._accumulated.of(parameter)

    def learning_rates(self) -> dict[str, float]:
        """Return the rate of every parameter group by name; of several (LoRA+ has two) the last stands for all."""
        return {group["name"]: float(group["lr"]) for o in self._optimizers for group in o.param_groups}

    def release(self) -> None:
        """Free the gradient buffers; the state stays."""
        if self._gradients is not None:
            self._gradients.release()
            self._gradients = None

    # ---- state ---------------------------------------------------------------------------------------------------

    def steps_made(self) -> float:
        """Return the number of steps of every trained parameter; CheckpointError when they differ."""
        return shards.steps_made(self._chunks, self._optimizers, self._pieces)

    def state(self) -> State:
        """Return the sharded state: weights, moments and masters of what trains."""
        return shards.state_to_save(self._chunks, self._optimizers, self._pieces)

    def load_weights(self, directory: Path, name: str) -> None:
        """Fill what trains from the files of the state ``name``; CheckpointError when they do not fit the model."""
        shards.load_weights(self._chunks, directory, name)

    def load_optimizers(self, steps: float, directory: Path, name: str) -> None:
        """Fill moments and masters bit for bit; learning rate and other settings stay the recipe's."""
        for optimizer in self._optimizers:
            shards.load_optimizer(self._chunks, optimizer, self._pieces, steps, directory, name)

    @property
    def _accumulated(self) -> Gradients:
        assert self._gradients is not None, "gradients accumulate in a fit only"
        return self._gradients

    @property
    def _device(self) -> torch.device:
        return next(self._chunks[0].parameters()).device
