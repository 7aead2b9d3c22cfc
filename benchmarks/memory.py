"""Memory as a plan predicts it and as training takes it: peak RSS minus RSS after the imports, a grid of small runs.

`make bench-memory` runs it. Every cell trains two steps in a process of its own; the
results go to ``benchmarks/results/memory.json`` and into docs/planning.md.
"""

import argparse
import json
import logging
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from torch.utils.data import DataLoader

from graftwork.atomic import atomic_write_text
from graftwork.batch import Batch
from graftwork.layout import Layout
from graftwork.models import GPT, T5, Model
from graftwork.models.shapes import Shape, T5Shape
from graftwork.peft import IA3, PEFT, CanonicalAdapter, DoRA, LoRA, PTuning, Selective
from graftwork.planning.blueprint import Blueprint
from graftwork.planning.checks import Intent
from graftwork.planning.devices import CPU, CPU_RUNTIME, Device
from graftwork.planning.plan import make_plan
from graftwork.planning.workload import Workload
from graftwork.training import MegatronStrategy, finetune

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "memory.json"
PAGE = ROOT / "docs" / "planning.md"
BEGIN, END = "<!-- figures: written by `make bench-memory` -->", "<!-- end of figures -->"
STEPS = 2
"""The second step has the optimizer's state beside it."""
MALLOC = {"MALLOC_MMAP_THRESHOLD_": "65536"}
"""glibc gives freed blocks back. By itself it keeps those below 32 MiB, in pieces: half as much again was measured."""
WORST = 0.10
"""Largest difference that a prediction may have, as a share of what was measured."""

SMALL = Shape(
    num_layers=6,
    hidden_size=192,
    ffn_hidden_size=512,
    num_attention_heads=6,
    num_query_groups=2,
    vocab_size=16000,
    max_position_embeddings=512,
    tie_embeddings=True,
)
WIDE = replace(SMALL, num_layers=4, hidden_size=384, ffn_hidden_size=1024, kv_channels=64)
GPT2 = replace(
    SMALL,
    family="gpt2",
    normalization="LayerNorm",
    activation="gelu_tanh",
    add_bias_linear=True,
    position_embedding="learned",
    num_query_groups=6,
)
SEQ2SEQ = T5Shape(
    num_layers=4, hidden_size=192, ffn_hidden_size=512, num_attention_heads=6, kv_channels=32, vocab_size=16000
)


def tuned(*transforms: Callable[[], PEFT]) -> Callable[[], list[PEFT]]:
    """Return what makes a fresh stack."""
    return lambda: [make() for make in transforms]


@dataclass(frozen=True)
class Cell:
    """One run of the grid: a model, what trains, the rows of a step."""

    name: str
    shape: Shape
    stack: Callable[[], list[PEFT]]
    rows: Workload
    dtype: str = "fp32"
    recompute: str | None = None

    @property
    def kind(self) -> type[Model]:
        """The kind of the model."""
        return T5 if isinstance(self.shape, T5Shape) else GPT

    def intent(self) -> Intent:
        """Return it as a plan takes it."""
        return Intent(
            Blueprint(self.kind, self.shape, self.dtype, self.recompute, self.stack()), Layout(), 1, self.rows
        )


PLAIN = Workload(seq_length=512, micro_batch_size=4, global_batch_size=8, answer_share=0.125)
PACKED = replace(PLAIN, packing=True, samples=4)
ONE = replace(PLAIN, global_batch_size=4)
LONG = replace(PLAIN, micro_batch_size=16, global_batch_size=16)
PAIRS = Workload(seq_length=512, micro_batch_size=4, global_batch_size=8, answer_length=64)

CELLS = [
    Cell("LoRA", SMALL, tuned(LoRA), PLAIN),
    Cell("LoRA, full recomputation", SMALL, tuned(LoRA), LONG, recompute="full"),
    Cell("LoRA, selective recomputation", SMALL, tuned(LoRA), PLAIN, recompute="selective"),
    Cell("LoRA, packed", SMALL, tuned(LoRA), PACKED),
    Cell("LoRA, bf16", SMALL, tuned(LoRA), LONG, dtype="bf16"),
    Cell("LoRA, wider model, packed", WIDE, tuned(LoRA), PACKED),
    Cell("DoRA", SMALL, tuned(DoRA), PLAIN),
    Cell("CanonicalAdapter", GPT2, tuned(CanonicalAdapter), PLAIN),
    Cell("IA3", WIDE, tuned(IA3), PLAIN),
    Cell("PTuning", SMALL, tuned(lambda: PTuning(virtual_tokens=10)), PLAIN),
    Cell("LoRA + Selective, norms", GPT2, tuned(LoRA, lambda: Selective(patterns=["norm"])), PLAIN),
    Cell("full fine-tuning", SMALL, tuned(), PLAIN),
    Cell("full fine-tuning, one microbatch", SMALL, tuned(), ONE),
    Cell("full fine-tuning, full recomputation", WIDE, tuned(), LONG, recompute="full"),
    Cell("full fine-tuning, bf16", SMALL, tuned(), replace(LONG, packing=True), dtype="bf16"),
    Cell("T5, LoRA", SEQ2SEQ, tuned(LoRA), PAIRS),
    Cell("T5, full fine-tuning", SEQ2SEQ, tuned(), PAIRS),
]


class RandomRows(pl.LightningDataModule):
    """Endless steps of random tokens, of the sizes of a cell."""

    def __init__(self, cell: Cell) -> None:
        super().__init__()
        self.cell = cell
        self.global_batch_size = cell.rows.global_batch_size
        self.micro_batch_size = cell.rows.micro_batch_size

    def train_dataloader(self) -> DataLoader[Batch]:
        """Return the steps."""
        return DataLoader([self._step(seed) for seed in range(STEPS)], batch_size=None)

    def _step(self, seed: int) -> Batch:
        rows, generator = self.cell.rows, torch.Generator().manual_seed(seed)
        count, last = rows.global_batch_size, self.cell.shape.vocab_size
        ids = torch.randint(last, (count, rows.seq_length), generator=generator)
        virtual = torch.tensor([i for one in self.cell.stack() for slot in one.prompt_slots(0) for i in slot.ids])
        ids[:, : len(virtual)] = virtual
        size = {"micro_batch_size": rows.micro_batch_size}
        if rows.answer_length is not None:
            answers = torch.randint(last, (count, rows.answer_length), generator=generator)
            lengths = torch.full((count,), rows.seq_length)
            return replace(Batch.of(answers, answers), source=ids, source_lengths=lengths, **size)
        labels = ids.masked_fill(torch.arange(rows.seq_length) < rows.seq_length * (1 - rows.answer_share), -100)
        if not rows.packing:
            return replace(Batch.of(ids, labels), **size)
        bounds = torch.linspace(0, rows.seq_length, rows.samples + 1).round().to(torch.int32)
        return replace(Batch.of(ids, labels), cu_seqlens=bounds.expand(count, -1), **size)


def train(cell: Cell, folder: Path) -> None:
    """Train a cell as ``nemorun graft finetune`` does."""
    trainer = pl.Trainer(
        strategy=MegatronStrategy(),
        accelerator="cpu",
        devices=1,
        max_steps=STEPS,
        limit_val_batches=0,
        num_sanity_val_steps=0,
        enable_progress_bar=False,
        use_distributed_sampler=False,
        gradient_clip_val=1.0,
        default_root_dir=folder,
    )
    model = cell.kind(cell.shape, dtype=cell.dtype, recompute=cell.recompute)
    finetune(model, trainer, RandomRows(cell), peft=cell.stack() or None)


def measured(cell: Cell) -> int:
    """Return the bytes at the peak above those after the imports, of a process of its own."""
    command = [sys.executable, "-W", "ignore", __file__, "--child", cell.name]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **MALLOC}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{cell.name} failed:\n{done.stderr}")
    return int(done.stdout.split()[-1])


def measure_here(cell: Cell) -> int:
    """Train in this process and return its bytes at the peak above those that it has now."""
    logging.disable(logging.WARNING)
    before = _status("VmRSS")
    with tempfile.TemporaryDirectory() as folder:
        train(cell, Path(folder))
    return _status("VmHWM") - before


def _status(name: str) -> int:
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return 1024 * int(lines[name].split()[0])


def predicted(cell: Cell) -> float:
    """Return the bytes that a plan says."""
    cpu = Device(CPU, 1e12, {"fp32": 1e11, "bf16": 1e11}, 1e10, 1e10, 1e10, CPU_RUNTIME, at_once=False)
    made = make_plan(cell.intent(), [cpu])
    assert not made.problems, made.problems
    return made.devices[0].peak


def lines(results: dict[str, Any]) -> Iterator[str]:
    """Yield the results as a Markdown table."""
    yield "| run | dtype | predicted | measured | difference |"
    yield "|---|---|---|---|---|"
    for cell in CELLS:
        if cell.name in results:
            found, said = results[cell.name]["measured"], results[cell.name]["predicted"]
            off = 100 * (said - found) / found
            yield f"| {cell.name} | {cell.dtype} | {said / 1e6:,.0f} MB | {found / 1e6:,.0f} MB | {off:+.1f} % |"


def write(results: dict[str, Any], page: Path = PAGE) -> None:
    """Keep the results, and replace what stands between the markers of the page."""
    atomic_write_text(RESULTS, json.dumps(results, indent=2) + "\n")
    before, rest = page.read_text().split(BEGIN)
    page.write_text(f"{before}{BEGIN}\n\n" + "\n".join(lines(results)) + f"\n\n{END}{rest.split(END)[1]}")


def main() -> None:
    """Measure the chosen cells, and print what the plan says of each."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cells", nargs="*", default=[cell.name for cell in CELLS])
    parser.add_argument("--out", type=Path, default=Path("runs/memory.json"), help="what is measured already")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        print(measure_here(next(cell for cell in CELLS if cell.name == options.child)))
        return
    kept: dict[str, int] = json.loads(options.out.read_text()) if options.out.exists() else {}
    for cell in (cell for cell in CELLS if cell.name in options.cells):
        if cell.name not in kept:
            kept[cell.name] = measured(cell)
            options.out.parent.mkdir(parents=True, exist_ok=True)
            atomic_write_text(options.out, json.dumps(kept, indent=2) + "\n")
        print(cell.name, f"{kept[cell.name] / 1e6:,.0f} MB", flush=True)
    results = {c.name: {"measured": kept[c.name], "predicted": round(predicted(c))} for c in CELLS if c.name in kept}
    print("\n".join(lines(results)))
    if len(results) == len(CELLS):
        write(results)


if __name__ == "__main__":
    main()
