"""Fragments that recipes share: each returns one configured object and knows no particular base model."""

from graftwork.recipes.parts.data import sft
from graftwork.recipes.parts.model import gpt, t5
from graftwork.recipes.parts.stack import ATTENTION_LORA, LORA, stack
from graftwork.recipes.parts.task import finetune_task
from graftwork.recipes.parts.trainer import megatron_trainer

__all__ = ["ATTENTION_LORA", "LORA", "finetune_task", "gpt", "megatron_trainer", "sft", "stack", "t5"]
