"""Answers and metrics of a model, with or without adapters, on rows, prompts and files.

Here belongs what a user asks of a trained model. No training, no layout: the models' own functions know that.
"""

import graftwork.compat  # noqa: F401  # before any other megatron import
from graftwork.inference.compare import compare, side_by_side
from graftwork.inference.evaluate import evaluate, evaluate_model
from graftwork.inference.examples import Examples
from graftwork.inference.generate import answer, generate, sample_answers

__all__ = [
    "Examples",
    "answer",
    "compare",
    "evaluate",
    "evaluate_model",
    "generate",
    "sample_answers",
    "side_by_side",
]
