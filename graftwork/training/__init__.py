"""Training: the strategy over megatron-core, the callbacks of a run, and ``finetune``, the verb."""

from graftwork.layout import Layout
from graftwork.training.finetune import finetune
from graftwork.training.strategy import MegatronStrategy

__all__ = ["Layout", "MegatronStrategy", "finetune"]
