"""A small GPT with weights that depend on names only, so that every parallel layout holds the same model."""

import zlib
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from graftwork import parallel
from graftwork.core.gpt import build_gpt
from graftwork.parallel.sharding import Sharding

VOCABULARY = 96
LENGTH = 32


def config(**overrides: Any) -> TransformerConfig:
    """Return a four-layer Llama-like configuration."""
    values: dict[str, Any] = {
        "num_layers": 4,
        "hidden_size": 64,
        "ffn_hidden_size": 96,
        "num_attention_heads": 4,
        "num_query_groups": 2,
        "add_bias_linear": False,
        "gated_linear_unit": True,
        "activation_func": F.silu,
        "normalization": "RMSNorm",
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        "use_cpu_initialization": True,
        "params_dtype": torch.float32,
        "pipeline_dtype": torch.float32,
        "cuda_graph_scope": [],
    }
    return TransformerConfig(**(values | overrides))


def build(cfg: TransformerConfig, vp_stage: int | None = None, tied: bool = False, **overrides: Any) -> nn.Module:
    """Build this rank's part of the model and fill it."""
    values: dict[str, Any] = {
        "vocab_size": VOCABULARY,
        "max_sequence_length": LENGTH,
        "position_embedding_type": "rope",
        "share_embeddings_and_output_weights": tied,
        "pre_process": parallel.is_first_stage(vp_stage),
        "post_process": parallel.is_last_stage(vp_stage),
        "vp_stage": vp_stage,
    }
    module = build_gpt(cfg, **(values | overrides))
    fill(module, tied)
    return module


def global_name(module: nn.Module, name: str) -> str:
    """Return the parameter's name in the whole model: global layer and expert numbers."""
    parts = name.split(".")
    if parts[:2] == ["decoder", "layers"]:
        parts[2] = str(module.decoder.layers[int(parts[2])].layer_number - 1)
    if "local_experts" in parts:
        index = parts.index("local_experts") + 1
        held = module.config.num_moe_experts // parallel.ep_size()
        parts[index] = str(int(parts[index]) + parallel.ep_rank() * held)
    return ".".join(parts)


def cut(module: nn.Module, name: str, parameter: Tensor) -> Sharding:
    """Return how a parameter is cut, from megatron-core's own attributes."""
    shape = list(parameter.shape)
    if not getattr(parameter, "tensor_model_parallel", False) or ".experts." in name:
        return Sharding(tuple(shape))
    dim = parameter.partition_dim
    shape[dim] *= parallel.tp_size()
    gated = "linear_fc1" in name and module.config.gated_linear_unit
    return Sharding(tuple(shape), dim, blocks=2 if gated else 1)


def fill(module: nn.Module, tied: bool) -> None:
    """Give every parameter a random value drawn from its global name."""
    for name, parameter in module.named_parameters():
        key = global_name(module, name)
        if tied and key == "output_layer.weight":
            key = "embedding.word_embeddings.weight"
        sharding = cut(module, name, parameter)
        generator = torch.Generator().manual_seed(zlib.crc32(key.encode()))
        full = torch.randn(sharding.shape, generator=generator) * 0.05 + (1.0 if "norm" in key else 0.0)
        parameter.data.copy_(sharding.take(full, parallel.tp_rank(), parallel.tp_size()))


def gathered(sharding: Sharding, local: Tensor) -> Tensor:
    """Return the full tensor from this tensor-parallel group's parts (experts are whole on their rank)."""
    if sharding.dim is None:
        return local
    parts = [torch.empty_like(local) for _ in range(parallel.tp_size())]
    dist.all_gather(parts, local.contiguous(), group=parallel.tp_group())
    return sharding.join(parts)


def full_gradients(module: nn.Module, tied: bool = False) -> dict[str, Tensor]:
    """Return the whole model's gradients that this rank knows, summed over every group that owes them a part."""
    gradients = {}
    for name, parameter in module.named_parameters():
        if parameter.grad is None:
            continue
        gradient = parameter.grad.clone()
        if getattr(parameter, "sequence_parallel", False) and module.config.sequence_parallel:
            dist.all_reduce(gradient, group=parallel.tp_group())
        expert = ".experts." in name and parallel.ep_size() > 1
        group = parallel.expert_dp_group() if expert else parallel.dp_group(with_context_parallel=True)
        dist.all_reduce(gradient, group=group)
        if tied and parallel.pp_size() > 1 and name.split(".")[0] in ("embedding", "output_layer"):
            dist.all_reduce(gradient, group=parallel.embedding_group())
        key = (
            "embedding.word_embeddings.weight" if tied and name == "output_layer.weight" else global_name(module, name)
        )
        gradients[key] = gathered(cut(module, name, parameter), gradient)
    return gradients
