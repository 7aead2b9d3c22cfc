"""What is compared between devices: small random models of each kind, every method, a fixed batch."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from graftwork import models
from graftwork.models import GPT, T5, Model
from graftwork.models.generation.scoring import device_of
from graftwork.models.proof import draw, logits
from graftwork.models.shapes import Shape, T5Shape
from graftwork.optim import AdamW
from graftwork.peft import (
    IA3,
    PEFT,
    CanonicalAdapter,
    CanonicalLoRA,
    DoRA,
    LoRA,
    PromptTuning,
    PTuning,
    Selective,
)

STEPS = 3
Stack = list[PEFT]
STACKS: dict[str, Callable[[], Stack]] = {
    "full fine-tuning": list,
    "lora": lambda: [LoRA(dim=4)],
    "canonical_lora": lambda: [CanonicalLoRA(dim=4)],
    "dora": lambda: [DoRA(dim=4)],
    "canonical_adapter": lambda: [CanonicalAdapter(dim=8)],
    "ia3": lambda: [IA3()],
    "ptuning": lambda: [PTuning(virtual_tokens=3, bottleneck_dim=16)],
    "prompt_tuning": lambda: [PromptTuning(virtual_tokens=3)],
    "selective": lambda: [Selective(patterns=["norm"])],
    "lora+ia3+canonical_adapter+ptuning": lambda: [
        LoRA(dim=4),
        IA3(),
        CanonicalAdapter(dim=8),
        PTuning(virtual_tokens=3, bottleneck_dim=16),
    ],
}
"""Every method alone, a stack, and none."""

_SIZES = {
    "num_layers": 3,
    "hidden_size": 64,
    "ffn_hidden_size": 96,
    "num_attention_heads": 4,
    "vocab_size": 211,
}
KINDS: dict[str, Callable[[], Model]] = {
    "gpt": lambda: GPT(Shape(**_SIZES, num_query_groups=2, max_position_embeddings=128), dtype="fp32"),
    "mixture": lambda: GPT(
        Shape(**_SIZES, num_query_groups=2, max_position_embeddings=128, family="mixtral", num_moe_experts=4),
        dtype="fp32",
    ),
    "t5": lambda: T5(T5Shape(**_SIZES, kv_channels=16), dtype="fp32"),
}
ONLY = {"mixture": ("full fine-tuning", "lora", "ia3")}
"""Kinds for which a part of the stacks is compared: the rest of such a model is as in ``gpt``."""


@dataclass(frozen=True)
class Case:
    """One stack on one kind of model."""

    kind: str
    stack: str

    @property
    def name(self) -> str:
        """The case in words."""
        return f"{self.kind}, {self.stack}"

    @property
    def place(self) -> str:
        """The directory of its adapter and its figures."""
        return f"{self.kind}-{self.stack.replace(' ', '_')}"


CASES = [Case(kind, stack) for kind in KINDS for stack in ONLY.get(kind, STACKS)]


def build(kind: str) -> Model:
    """Return a random model whose norms and biases are not at ones and zeros."""
    model = KINDS[kind]()
    model.configure_model()
    _move(dict(model.named_parameters()), 0.1)
    return model


def graft(model: Model, stack: str) -> None:
    """Attach a stack and move each of its values, so that every one of its gradients counts."""
    transforms = STACKS[stack]()
    if transforms:
        model.add_adapter(transforms)
        _move({t.key: t.parameter for name in model.adapters for t in model.stack.tensors(name)}, 0.1)


def load(case: Case, folder: Path, dtype: str = "fp32") -> Model:
    """Return the model of a case from the files that the reference has written: base and adapter."""
    model = models.load(folder / case.kind, dtype=dtype)
    if case.stack != "full fine-tuning":
        model.load_adapters(folder / case.place / "adapter")
    return model


def record(model: Model) -> dict[str, Tensor]:
    """Return logits, the losses of three steps and the first step's gradients, on the CPU.

    Without adapters every weight trains. Gradients are named as the model names its parameters.
    """
    probe = draw(model, list(model.adapters))
    assert probe is not None, "the context holds a row"
    found = {"logits": logits(model, probe, list(model.adapters))}
    ids = [[*(i for slot in model.prompt_layout.slots for i in slot.ids), *row] for row in probe.prompts]
    batch = model.lay_out(ids, probe.answers, device_of(model))
    optimizer, _ = AdamW(lr=1e-3, schedule="constant").build(model, STEPS)
    model.train()
    for step in range(STEPS):
        output, loss_of = model.forward_step(iter([batch]), model.chunks[0])
        total, count, _ = loss_of(output)
        loss = total / count
        loss.backward()
        found[f"loss {step + 1}"] = loss.detach().reshape(1).cpu()
        if not step:
            found |= {f"gradient {name}": grad for name, grad in _gradients(model).items()}
        optimizer.step()
        optimizer.zero_grad()
    return {name: value.float().contiguous() for name, value in found.items()}


def _gradients(model: Model) -> dict[str, Tensor]:
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    missing = [name for name, p in trained if p.grad is None]
    if missing:
        raise SystemExit(f"{missing[0]} trains, but got no gradient.")
    return {name: p.grad.detach().cpu().clone() for name, p in trained if p.grad is not None}


def _move(parameters: dict[str, torch.nn.Parameter], scale: float) -> None:
    with torch.no_grad():
        for name, parameter in parameters.items():
            noise = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(sum(map(ord, name))))
            parameter.add_(scale * noise.to(parameter.device, parameter.dtype))
