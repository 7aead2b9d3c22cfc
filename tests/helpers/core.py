"""Build a megatron-core model for a checkpoint, without the LightningModule."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from graftwork import parallel
from graftwork.core.gpt import build_gpt
from graftwork.models.shapes import Shape
from graftwork.models.weights import load_weights, read_config, shape_from_hf


def build(shape: Shape, dtype: torch.dtype = torch.float32, vp: int | None = None, **config: Any) -> torch.nn.Module:
    """Return this rank's stage of ``shape`` (its virtual stage ``vp``), randomly initialised."""
    parallel.ensure_initialized()
    sizes = {
        "tensor_model_parallel_size": parallel.tp_size(),
        "pipeline_model_parallel_size": parallel.pp_size(),
        "virtual_pipeline_model_parallel_size": parallel.vp_size(),
        "params_dtype": dtype,
    }
    model = build_gpt(
        shape.transformer_config(**sizes, **config),
        **shape.gpt_arguments(parallel.tp_size()),
        pre_process=parallel.is_first_stage(vp),
        post_process=parallel.is_last_stage(vp),
        vp_stage=vp,
    )
    return model.eval()


def loaded(directory: Path, dtype: torch.dtype = torch.float32) -> tuple[torch.nn.Module, Shape]:
    """Return (this rank's stage with the weights of ``directory``, its shape)."""
    shape = shape_from_hf(read_config(directory))
    module = build(shape, dtype)
    load_weights(module, shape, directory)
    return module, shape


def logits(module: torch.nn.Module, tokens: Tensor) -> Tensor:
    """Return the (local, padded) logits [b, s, vocab] of a one-stage model; ``tokens`` is [b, s]."""
    positions = torch.arange(tokens.shape[1]).expand_as(tokens)
    with torch.no_grad():
        return module(tokens, positions, None)
