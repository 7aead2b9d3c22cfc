"""One cell of the fidelity matrix: a model and a stack, trained for three steps in whatever layout the ranks have.

Every layout starts from the same Hugging Face checkpoint (or weights drawn from names, for a mixture of experts) and
from the same adapter artifact, written by one process, and reports full tensors under their global names.
"""

import zlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch import Callback, LightningDataModule, Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader

from graftwork.compat import parallel
from graftwork.compat.sharding import Sharding
from graftwork.models import GPT
from graftwork.models.hf import read_config, shape_from_hf
from graftwork.models.shapes import Shape
from graftwork.optim import AdamW
from tests.contracts.methods import STACKS
from tests.helpers.standin import trainer_for
from tests.helpers.tiny_gpt import cut, global_name

LENGTH, ROWS, STEPS = 16, 8, 3
MIXTURE = {
    "num_layers": 2,
    "hidden_size": 32,
    "ffn_hidden_size": 48,
    "num_attention_heads": 4,
    "num_query_groups": 2,
    "vocab_size": 61,
    "max_position_embeddings": 64,
    "num_moe_experts": 4,
    "moe_router_topk": 2,
    "moe_ffn_hidden_size": 24,
}
LEARNING = {"lr": 3e-2, "eps": 0.1, "schedule": "constant"}
"""A large eps: with Adam's own, rounding of tiny gradients would turn into steps of the size of lr."""


@dataclass(frozen=True)
class Cell:
    """``base``: name of a checkpoint below the workspace, or "mixture"; ``stack``: a key of STACKS, or "full"."""

    base: str
    stack: str
    packed: bool = False
    recompute: str | None = None


@dataclass
class Outcome:
    """What one rank knows of a cell; tensors are whole and under their global names."""

    losses: list[float] = field(default_factory=list)
    initial: dict[str, Tensor] = field(default_factory=dict)
    gradients: dict[str, Tensor] = field(default_factory=dict)
    weights: dict[str, Tensor] = field(default_factory=dict)
    logits: Tensor | None = None


class Named(GPT):
    """A GPT whose random weights depend on their global names only."""

    def configure_model(self) -> None:
        """Build, then draw every base weight."""
        fresh = self.module is None
        super().configure_model()
        for chunk in self.chunks if fresh else []:
            for name, parameter in chunk.named_parameters():
                if ".adapters." not in name:
                    _draw(chunk, name, parameter)


def model_of(cell: Cell, workspace: Path) -> GPT:
    """Return the cell's model, not built yet."""
    if cell.base == "mixture":
        return Named(Shape(**MIXTURE), dtype="fp32", recompute=cell.recompute)
    directory = workspace / cell.base
    return GPT(shape_from_hf(read_config(directory)), checkpoint=str(directory), recompute=cell.recompute)


def run_cells(
    rank: int, world: int, cells: list[Cell], layout: dict[str, Any], workspace: Path, breakage: str = ""
) -> dict[Cell, Outcome]:
    """Train every cell in one process group; ``breakage`` names a deliberate mistake of ``breaks``."""
    from tests.parallel.breaks import BREAKS

    if breakage:
        BREAKS[breakage]()
    return {cell: run_cell(rank, world, cell, layout, workspace) for cell in cells}


def run_cell(rank: int, world: int, cell: Cell, layout: dict[str, Any], workspace: Path) -> Outcome:
    """Train one cell; the trained adapters are saved below the workspace under the layout's name."""
    model, probe = model_of(cell, workspace), Probe(workspace / "born" / adapter_directory(cell))
    model.optim = AdamW(**LEARNING)
    if cell.stack != "full":
        model.add_adapter(STACKS[cell.stack]())
    trainer = trainer_for(layout, world, rank, callbacks=[probe], max_steps=STEPS)
    trainer.fit(model, datamodule=Rows(cell.packed))
    if cell.stack != "full":
        model.save_adapters(workspace / layout_name(layout, world) / adapter_directory(cell))
    return probe.outcome


def adapter_directory(cell: Cell) -> str:
    """Return a directory name for a cell's adapters."""
    return f"{cell.base}-{cell.stack}-{cell.packed}-{cell.recompute}"


def layout_name(layout: dict[str, Any], world: int) -> str:
    """Return a directory name for a layout."""
    return "-".join([str(world), *(f"{k[:8]}{v}" for k, v in layout.items())])


class Rows(LightningDataModule):
    """Random rows of LENGTH positions, prompts in front, answers of very different lengths, cut over replicas."""

    global_batch_size, micro_batch_size = ROWS, 2

    def __init__(self, packed: bool = False) -> None:
        super().__init__()
        self.packed = packed

    def train_dataloader(self) -> DataLoader:
        """Return STEPS different batches."""
        model: Any = self.trainer.lightning_module
        batches = [step_batch(model, seed, self.packed) for seed in range(1, STEPS + 1)]
        return DataLoader(batches, batch_size=None)


def step_batch(model: GPT, seed: int, packed: bool) -> dict[str, Any]:
    """Return this replica's rows of one global batch."""
    generator = torch.Generator().manual_seed(seed)
    prompt = [i for slot in model.prompt_layout.slots for i in slot.ids]
    ids = torch.randint(model.shape.vocab_size, (ROWS, LENGTH + 1), generator=generator)
    tokens, labels = ids[:, :-1].clone(), ids[:, 1:].clone()
    starts = [0, 9] if packed else [0]
    positions = torch.arange(LENGTH).expand(ROWS, -1).clone()
    for start in starts:
        tokens[:, start : start + len(prompt)] = torch.tensor(prompt, dtype=torch.long)
        labels[:, max(start - 1, 0) : start + len(prompt)] = -100
        positions[:, start:] = torch.arange(LENGTH - start)
    for row in range(ROWS):
        labels[row, : 3 + int(torch.randint(LENGTH - 5, (), generator=generator))] = -100
    batch = {"tokens": tokens, "labels": labels, "position_ids": positions}
    if packed:
        batch["cu_seqlens"] = torch.tensor([*starts, LENGTH], dtype=torch.int32).expand(ROWS, -1).contiguous()
    mine = {k: v[parallel.dp_rank() :: parallel.dp_size()].contiguous() for k, v in batch.items()}
    return {**mine, "packed": packed, "micro_batch_size": 2}


class Probe(Callback):
    """Keeps initial values, then loads the common artifact; keeps logits, losses, gradients, trained weights."""

    def __init__(self, artifact: Path) -> None:
        self.artifact, self.outcome = artifact, Outcome()

    def on_fit_start(self, trainer: Trainer, model: Any) -> None:
        """Start every layout from the same adapter values."""
        self.outcome.initial = whole(model, {id(p): p for p in model.parameters()})
        if model.adapters:
            model.load_adapters(self.artifact)
        prompt = [i for slot in model.prompt_layout.slots for i in slot.ids]
        ids = torch.tensor([[*prompt, 5, 7, 11, 13, 17, 19], [*prompt, 2, 3, 23, 29, 31, 37]])
        with torch.no_grad():
            self.outcome.logits = model(ids)

    def on_before_optimizer_step(self, trainer: Trainer, model: Any, optimizer: Any) -> None:
        """Keep the first step's gradients."""
        if not self.outcome.losses:
            self.outcome.gradients = whole(model, {id(p): p.grad for p in model.parameters()})

    def on_train_batch_end(self, trainer: Trainer, model: Any, *_: Any) -> None:
        """Keep the loss and the weights so far."""
        self.outcome.losses.append(float(trainer.callback_metrics["train_loss"]))
        self.outcome.weights = whole(model, {id(p): p for p in model.parameters()})


def whole(model: Any, values: dict[int, Tensor | None]) -> dict[str, Tensor]:
    """Return full tensors by global name: ``values`` of every trainable parameter, joined over tensor ranks."""
    found = {}
    for chunk in model.chunks:
        for name, parameter in chunk.named_parameters():
            value = values[id(parameter)]
            if parameter.requires_grad and value is not None:
                key = _key(chunk, name, parameter)
                found[key] = _join(chunk, name, parameter, value.detach(), model.shape.vocab_size)
    return found


def _key(chunk: nn.Module, name: str, parameter: Tensor) -> str:
    tied = getattr(parameter, "shared", False)  # the last stage's copy of a tied embedding
    return "embedding.word_embeddings.weight" if tied else global_name(chunk, name)


def _join(chunk: Any, name: str, parameter: Tensor, local: Tensor, vocabulary: int) -> Tensor:
    own = getattr(parameter, "sharding", None)
    sharding = own if own is not None else cut(chunk, name, parameter)
    size = parallel.tp_size() if sharding.dim is not None else 1
    parts = [local.contiguous()]
    if size > 1:
        parts = [torch.empty_like(parts[0]) for _ in range(size)]
        dist.all_gather(parts, local.contiguous(), group=parallel.tp_group())
    full = sharding.join(parts)
    is_vocabulary = own is None and ("word_embeddings" in name or "output_layer" in name)
    return (full[:vocabulary] if is_vocabulary else full).clone()


def _draw(chunk: Any, name: str, parameter: nn.Parameter) -> None:
    key, sharding = global_name(chunk, name), cut(chunk, name, parameter)
    if sharding.dim is not None and ("word_embeddings" in name or "output_layer" in name):
        sharding = Sharding((MIXTURE["vocab_size"], sharding.shape[1]), 0, padded=sharding.shape[0])
    generator = torch.Generator().manual_seed(zlib.crc32(key.encode()))
    full = torch.randn(sharding.shape, generator=generator) * 0.08 + (1.0 if "norm" in key else 0.0)
    parameter.data.copy_(sharding.take(full, parallel.tp_rank(), parallel.tp_size()))
