"""What a training step sends: two numbers, and each trainable gradient once; nothing for what is frozen."""

from typing import Any

import pytest
import torch.distributed as dist

from tests.helpers.distributed import run_ranks
from tests.helpers.standin import Rows, StandIn, trainer_for

SCALARS = 2
"""Numbers summed over the replicas in a step: answer tokens and loss (the norm is known to each replica)."""


def sent(rank: int, world_size: int, layout: dict[str, Any], train: str) -> tuple[list[int], int]:
    """Return (elements of every all-reduce of the second step, elements of the trainable parameters)."""
    module, sizes, real = StandIn(train=train), [], dist.all_reduce

    def counted(tensor: Any, *args: Any, **kwargs: Any) -> Any:
        group = kwargs.get("group")
        if dist.get_world_size(group) > 1:
            sizes.append(tensor.numel())
        return real(tensor, *args, **kwargs)

    trainer = trainer_for(layout, world_size, rank, max_steps=2, limit_val_batches=0)
    step = trainer.strategy.training_step
    trainer.strategy.training_step = lambda *args: (sizes.clear(), step(*args))[1]  # type: ignore[method-assign]
    dist.all_reduce = counted
    trainer.fit(module, datamodule=Rows(steps=2))
    found = list(sizes)
    return found, sum(p.numel() for p in module.parameters() if p.requires_grad)


def all_cases(rank: int, world_size: int) -> dict[str, tuple[list[int], int]]:
    """Go through every case in the same two processes."""
    pipeline = {"pipeline_model_parallel_size": 2}
    return {
        "few": sent(rank, world_size, {}, "linear_qkv.weight"),
        "all": sent(rank, world_size, {}, "all"),
        "pipeline": sent(rank, world_size, pipeline, "linear_qkv.weight"),
    }


@pytest.mark.processes
def test_a_step_sends_each_trainable_gradient_once_and_a_few_numbers() -> None:
    for found in run_ranks(all_cases, 2):
        for case in ("few", "all"):
            sizes, trainable = found[case]
            assert sum(sizes) == trainable + SCALARS and len(sizes) == 1 + SCALARS
        assert found["few"][1] < found["all"][1]
        assert found["pipeline"][0] == [1], "stages share only the norm beside their activations"
