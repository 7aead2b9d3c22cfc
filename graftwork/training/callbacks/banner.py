"""What is about to happen, in a few lines before the first step."""

from collections.abc import Iterator, Mapping
from typing import Protocol, runtime_checkable

from lightning.pytorch import Callback, LightningModule, Trainer

from graftwork.data.source import Source, title
from graftwork.layout import Layout
from graftwork.models.base import Model
from graftwork.parallel.collective import world_size
from graftwork.peft.report import sites
from graftwork.training.strategy import MegatronStrategy
from graftwork.training.summary import count_parameters, peak_memory_bytes
from graftwork.training.trainee import data_of, trainee

DEGREES = {
    "tensor": "tensor_model_parallel_size",
    "pipeline": "pipeline_model_parallel_size",
    "context": "context_parallel_size",
    "expert": "expert_model_parallel_size",
}


@runtime_checkable
class Counted(Protocol):
    """Data that know how many rows they have."""

    sizes: Mapping[str, int]
    """Rows by split."""
    files: Mapping[str, Source | None]
    """What they are read from, by split."""
    global_batch_size: int
    seq_length: int
    packing: bool


class Banner(Callback):
    """Tells on the first rank what trains, of which base, where, on what, how long and how large it is by now."""

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Count, on every rank, and print."""
        said = [_trains(pl_module), *(f"  {line}" for line in _around(trainer, pl_module))]
        if trainer.is_global_zero:
            print("\n".join(said), flush=True)


def _trains(pl_module: LightningModule) -> str:
    trained, total = count_parameters(pl_module)
    names = ", ".join(t.summary() for t in trainee(pl_module).adapters.values()) or "full fine-tuning"
    return f"training {names}: {trained:,} of {total:,} parameters ({100 * trained / total:.2f} %)"


def _around(trainer: Trainer, pl_module: LightningModule) -> Iterator[str]:
    if isinstance(pl_module, Model):
        shape, chunk = pl_module.shape, pl_module.chunks[0]
        dtype = str(next(chunk.parameters()).dtype).removeprefix("torch.")
        checkpoint = pl_module.checkpoint or "random weights"
        yield f"base: {checkpoint}, {shape.family} of {shape.num_layers} layers x {shape.hidden_size}, {dtype}"
        if pl_module.adapters:
            yield f"at: {_places(pl_module)}"
    data = data_of(trainer)
    if isinstance(data, Counted):
        yield f"data: {_rows(data)}"
    yield f"run: {_steps(trainer)}, on {_ranks(trainer)}"
    yield f"memory: {peak_memory_bytes() / 1e9:.2f} GB in this process before the first step"


def _places(model: Model) -> str:
    """Return how many sites there are of each name."""
    names = [report.site.rpartition(".")[2] for report in sites(model.stack)]
    return ", ".join(f"{names.count(name)} {name}" for name in dict.fromkeys(names))


def _rows(data: Counted) -> str:
    parts = [f"{split} {rows:,} rows ({_from(data, split)})" for split, rows in data.sizes.items()]
    packed = "packed into rows of" if data.packing else "of at most"
    return f"{', '.join(parts)}; {data.global_batch_size} a step, {packed} {data.seq_length} tokens"


def _from(data: Counted, split: str) -> str:
    own, train = data.files.get(split), data.files["train"]
    return title(own) if own is not None else f"held out of {title(train or '')}"


def _steps(trainer: Trainer) -> str:
    steps, begun = trainer.estimated_stepping_batches, trainer.global_step
    total = f"{int(steps):,} steps" if 0 < steps < float("inf") else "steps without end"
    return f"{total}, from step {begun:,} on" if begun else total


def _ranks(trainer: Trainer) -> str:
    layout = trainer.strategy.layout if isinstance(trainer.strategy, MegatronStrategy) else Layout()
    cut = [f"{name} {size}" for name, field in DEGREES.items() if (size := getattr(layout, field)) > 1]
    world = world_size()
    ranks = f"{world} rank{'s' if world > 1 else ''} ({trainer.strategy.root_device.type})"
    return f"{ranks}: {' x '.join(cut)}" if cut else ranks
