"""The verb of a recipe."""

import nemo_run as run

from graftwork.optim import AdamW
from graftwork.recipes.parts.stack import stack
from graftwork.training import finetune


def finetune_task(
    model: run.Config, trainer: run.Config, data: run.Config, peft: object, warmup_steps: int
) -> run.Partial:
    """Return ``finetune`` over the parts; the learning rate is each method's own until ``optim.lr`` is set."""
    return run.Partial(
        finetune,
        model=model,
        trainer=trainer,
        data=data,
        peft=stack(peft),
        optim=run.Config(AdamW, warmup_steps=warmup_steps),
    )
