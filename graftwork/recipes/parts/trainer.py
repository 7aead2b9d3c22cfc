"""The Lightning trainer of a recipe: megatron-core's parallel layout and how long to train."""

import lightning.pytorch as pl
import nemo_run as run

from graftwork.training import MegatronStrategy


def megatron_trainer(
    dir: str,
    name: str,
    num_nodes: int,
    num_gpus_per_node: int,
    max_steps: int = 1000,
    tensor: int = 1,
    pipeline: int = 1,
    expert: int = 1,
    context: int = 1,
) -> run.Config:
    """Return a configured trainer that writes to ``dir/name``; sequence parallelism goes with tensor parallelism."""
    strategy = run.Config(
        MegatronStrategy,
        tensor_model_parallel_size=tensor,
        pipeline_model_parallel_size=pipeline,
        expert_model_parallel_size=expert,
        **({"context_parallel_size": context} if context > 1 else {}),
        sequence_parallel=tensor > 1,
    )
    return run.Config(
        pl.Trainer,
        accelerator="auto",
        strategy=strategy,
        devices=num_gpus_per_node,
        num_nodes=num_nodes,
        max_steps=max_steps,
        val_check_interval=max(1, max_steps // 10),
        check_val_every_n_epoch=None,
        num_sanity_val_steps=0,
        log_every_n_steps=1,
        gradient_clip_val=1.0,
        use_distributed_sampler=False,
        enable_model_summary=False,
        default_root_dir=f"{dir}/{name}",
    )
