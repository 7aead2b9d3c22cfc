"""Training: ``finetune``, the strategy over megatron-core's schedule, the update, what resumes, a run's callbacks.

Here belongs what happens from a model, data and a stack to a run directory. No model class, no method, no recipe.
"""

from graftwork.layout import Layout
from graftwork.training.adverts import keep_out
from graftwork.training.finetune import finetune
from graftwork.training.strategy import MegatronStrategy

keep_out()

__all__ = ["Layout", "MegatronStrategy", "finetune"]
