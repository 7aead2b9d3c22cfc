"""Logits of a probe in transformers, with Hugging Face PEFT: code that shares nothing with ours but the files."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from graftwork.errors import ConfigError
from graftwork.models.precision import DTYPES
from graftwork.models.weights import family_of, read_config
from graftwork.peft.artifact.proof import Probe

Run = Callable[[Probe], Tensor]
"""Takes a probe and returns fp32 logits [n, vocabulary] of its answers."""


def checkpoint(directory: Path, dtype: str) -> Any:
    """Return transformers' model of a checkpoint, made anew; raises ConfigError where it is not installed."""
    try:
        import transformers
    except ImportError as error:
        raise ConfigError("client='transformers' needs the package transformers; install graftwork[hf].") from error
    seq2seq = family_of(read_config(directory)).kind == "t5"
    kind = transformers.AutoModelForSeq2SeqLM if seq2seq else transformers.AutoModelForCausalLM
    return kind.from_pretrained(directory, dtype=DTYPES[dtype]).eval()


def adapted(model: Any, adapter: Path) -> Any:
    """Return such a model with an adapter of Hugging Face PEFT; raises ConfigError where peft is not installed."""
    try:
        import peft
    except ImportError as error:
        raise ConfigError("client='transformers' needs the package peft; install graftwork[hf].") from error
    return peft.PeftModel.from_pretrained(model, adapter).eval()


def logits(model: Any, probe: Probe, vocabulary: int) -> Tensor:
    """Return fp32 logits [n, vocabulary] of the answers, row by row and without padding."""
    with torch.no_grad():
        rows = [_row(model, prompt, answer) for prompt, answer in zip(probe.prompts, probe.answers, strict=True)]
    return torch.cat(rows)[:, :vocabulary].float()


def _row(model: Any, prompt: list[int], answer: list[int]) -> Tensor:
    found: Tensor
    if model.config.is_encoder_decoder:
        ids, read = torch.tensor([prompt]), torch.tensor([[model.config.decoder_start_token_id, *answer[:-1]]])
        found = model(input_ids=ids, attention_mask=torch.ones_like(ids), decoder_input_ids=read).logits[0]
        return found[-len(answer) :]
    ids = torch.tensor([[*prompt, *answer]])
    found = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[0]  # virtual tokens stand in front
    return found[-len(answer) - 1 : -1]
