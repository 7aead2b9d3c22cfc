"""Every method and stack, every model family: what the contract tests are parametrized over.

A new method is tested as soon as it is in the registry.
"""

import inspect
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from graftwork.batch import IGNORED, Batch
from graftwork.models import GPT
from graftwork.models.shapes import Shape
from graftwork.parallel.record import record_of
from graftwork.peft import (
    IA3,
    METHODS,
    PEFT,
    CanonicalAdapter,
    CanonicalLoRA,
    DoRA,
    LoRA,
    PromptTuning,
    PTuning,
    Selective,
)

TINY: dict[str, Any] = {"dim": 4, "virtual_tokens": 3, "embedding_dim": 12, "bottleneck_dim": 10, "init_std": 0.3}
"""Values of hyper-parameters for the tiny models, wherever a method has them."""
OTHER: dict[type[PEFT], dict[str, Any]] = {CanonicalAdapter: {"dim": 6}, Selective: {"patterns": ["norm"]}}
IDS = {"canonical_adapter": "canonical"}


def tiny(method: type[PEFT]) -> PEFT:
    """Return a transform of this method for the tiny models."""
    known = inspect.signature(method).parameters
    return method(**{n: v for n, v in {**TINY, **OTHER.get(method, {})}.items() if n in known})


def by_task() -> list[PEFT]:
    """Return two prompts, each with rows of its own for two tasks."""
    options = {"embedding_dim": 12, "bottleneck_dim": 5, "encoder": "lstm"}
    return [PTuning(**options, tasks={"a": 2, "b": 2}), PromptTuning(tasks={"a": 2, "b": 1})]


def stack(*methods: type[PEFT]) -> list[PEFT]:
    """Return a fresh stack, inner to outer."""
    return [tiny(method) for method in methods]


def everything() -> list[PEFT]:
    """Return one of every method; DoRA is the innermost, for its magnitude scales what is inside of it."""
    return stack(DoRA, *(method for method in METHODS.values() if method is not DoRA))


STACKS: dict[str, Callable[[], list[PEFT]]] = {
    **{IDS.get(method.short_name(), method.short_name()): partial(stack, method) for method in METHODS.values()},
    "lora+ia3": partial(stack, LoRA, IA3),
    "ia3+lora": partial(stack, IA3, LoRA),
    "lora+canonical": partial(stack, LoRA, CanonicalAdapter),
    "ptuning+canonical": partial(stack, PTuning, CanonicalAdapter),
    "all": partial(stack, LoRA, IA3, CanonicalAdapter, PTuning),
    "lora's relatives": partial(stack, DoRA, CanonicalLoRA, LoRA),
    "tasks": by_task,
    "lora+selective": partial(stack, LoRA, Selective),
    "everything": everything,
}

VOCABULARY = 61
"""Odd, so that padding at TP2 is not a no-op."""
_SIZES: dict[str, Any] = {
    "num_layers": 2,
    "hidden_size": 32,
    "ffn_hidden_size": 48,
    "num_attention_heads": 4,
    "num_query_groups": 2,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 64,
}
_LAYER_NORM: dict[str, Any] = {"num_query_groups": 4, "normalization": "LayerNorm", "add_bias_linear": True}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "llama_tied": {"tie_embeddings": True},
    "gpt2": {
        **_LAYER_NORM,
        "family": "gpt2",
        "activation": "gelu_tanh",
        "position_embedding": "learned",
        "tie_embeddings": True,
    },
    "qk_norm": {"qk_layernorm": True, "kv_channels": 16},
    "nemotron": {
        "family": "nemotron",
        "normalization": "LayerNorm",
        "layernorm_zero_centered_gamma": True,
        "activation": "squared_relu",
        "rotary_percent": 0.5,
    },
}

every_stack = pytest.mark.parametrize("stack", STACKS)
every_family = pytest.mark.parametrize("family", FAMILIES)


def shape(family: str = "llama", **sizes: Any) -> Shape:
    """Return the tiny shape of a family."""
    return Shape(**{**_SIZES, **FAMILIES[family], **sizes})


def make(family: str = "llama", sizes: dict[str, Any] | None = None, **options: Any) -> GPT:
    """Build a random model whose norms and biases are not at ones and zeros, so that none of them can hide."""
    model = GPT(shape(family, **(sizes or {})), **{"dtype": "fp32", **options})
    model.configure_model()
    roughen(model)
    return model


def roughen(model: nn.Module) -> None:
    """Move every base parameter by noise drawn from its name."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            generator = torch.Generator().manual_seed(len(name) + sum(map(ord, name)))
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator).to(parameter.dtype))


def shake(model: GPT, scale: float = 0.3, only: str | None = None) -> None:
    """Move every trained value by noise, so that each adapter changes the output."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name in model.adapters if only is None else [only]:
            for tensor in model.stack.tensors(name):
                tensor.parameter.add_(scale * torch.randn(tensor.parameter.shape, generator=generator))


def tokens(rows: int = 2, length: int = 9, seed: int = 3) -> Tensor:
    """Return ids [rows, length] of the real vocabulary."""
    return torch.randint(VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(seed))


def prompted(model: GPT, ids: Tensor) -> Tensor:
    """Return ids with the virtual tokens of every attached prompt in front."""
    prompt = [i for slot in model.prompt_layout.slots for i in slot.ids]
    return torch.cat([torch.tensor(prompt, dtype=torch.long).expand(len(ids), -1), ids], dim=1)


def batch(model: GPT, seed: int = 3) -> Batch:
    """Return a training batch whose answers are the last six positions, prompts in front (T5: a decoder's)."""
    ids = prompted(model, tokens(seed=seed))
    if model.seq2seq:
        answers = tokens(length=6, seed=seed + 1)
        return replace(model.lay_out(ids.tolist(), answers.tolist(), ids.device), micro_batch_size=2)
    labels = ids.roll(-1, 1).masked_fill(torch.arange(ids.shape[1]) < ids.shape[1] - 6, IGNORED)
    labels[:, -1] = 5
    return replace(Batch.of(ids, labels), micro_batch_size=2)


def loss(model: GPT, seed: int = 3) -> Tensor:
    """Return the mean answer loss of one batch."""
    output, loss_func = model.forward_step(iter([batch(model, seed)]), model.chunks[0])
    total, count, _ = loss_func(output)
    return total / count


def adapter_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Yield the parameters that adapters own."""
    yield from ((n, p) for n, p in model.named_parameters() if record_of(p).owner is not None)


def beside_the_base(model: nn.Module) -> set[str]:
    """Return the names of the parameters that adapters have added, all but those that the base lends."""
    lent = {id(tensor.parameter) for tensors in model.stack.lent.values() for tensor in tensors}
    return {n for n, p in adapter_parameters(model) if id(p) not in lent}


def base_values(model: nn.Module) -> dict[str, Tensor]:
    """Return copies of the base's parameters by name."""
    return {n: p.detach().clone() for n, p in model.named_parameters() if record_of(p).owner is None}


def same(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    """Tell whether two sets of tensors are bit-equal, names and order included."""
    return list(first) == list(second) and all(torch.equal(a, b) for a, b in zip(first.values(), second.values()))
