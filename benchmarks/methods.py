"""Every method on real data: SmolLM2-135M on movie sentiment, held-out figures before and after.

Each row is its own run directory in ``--out``; the table goes to stdout and ``benchmarks/results/methods.json``.
Learning rates are the methods' own defaults. On two CPU cores a row takes a few minutes.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import lightning.pytorch as pl

from graftwork import models
from graftwork.atomic import atomic_write_text
from graftwork.data import SFTDataModule
from graftwork.inference import evaluate_model
from graftwork.optim import AdamW
from graftwork.peft import IA3, PEFT, CanonicalAdapter, LoRA, PTuning
from graftwork.training import MegatronStrategy, finetune

sys.path.insert(0, str(Path(__file__).parents[1] / "examples" / "sentiment"))
from prepare import prepare

RESULTS = Path(__file__).with_name("results") / "methods.json"
TEMPLATE = "Review: {input} Sentiment:"
STACKS: dict[str, Any] = {
    "LoRA": lambda: [LoRA(dim=8, alpha=16)],
    "CanonicalAdapter": lambda: [CanonicalAdapter(dim=16)],
    "IA3": lambda: [IA3()],
    "PTuning": lambda: [PTuning(virtual_tokens=10)],
    "PTuning + CanonicalAdapter": lambda: [PTuning(virtual_tokens=10), CanonicalAdapter(dim=16)],
}


def run(name: str, stack: list[PEFT], data: Path, out: Path, steps: int, rows: int) -> dict[str, Any]:
    """Fine-tune with ``stack`` and return its held-out figures (and the base's, without adapters)."""
    sft = SFTDataModule(
        train=str(data / "train.jsonl"),
        validation=str(data / "validation.jsonl"),
        test=str(data / "test.jsonl"),
        prompt_template=TEMPLATE,
        seq_length=128,
        global_batch_size=8,
        micro_batch_size=8,
    )
    trainer = pl.Trainer(
        strategy=MegatronStrategy(),
        accelerator="cpu",
        devices=1,
        max_steps=steps,
        val_check_interval=max(1, steps // 4),
        check_val_every_n_epoch=None,
        num_sanity_val_steps=0,
        gradient_clip_val=1.0,
        default_root_dir=out / name.replace(" + ", "-"),
    )
    model = models.load("smollm2_135m", trainer=trainer, dtype="auto")
    optim = AdamW(warmup_steps=max(1, steps // 6), schedule="linear")
    summary = finetune(model, trainer, sft, peft=stack, optim=optim, resume=False)
    best = models.load("smollm2_135m", dtype="auto")
    best.load_adapters(summary["adapter_path"])
    after = evaluate_model(best, sft, split="test", limit=rows)
    with best.adapters_disabled():
        before = evaluate_model(best, sft, split="test", limit=rows)
    keys = ("loss", "exact_match", "accuracy")
    return {
        "stack": name,
        "lr": [t.default_lr for t in stack],
        "trainable_parameters": summary["trainable_parameters"],
        "steps": steps,
        **{f"{k}_before": before[k] for k in keys},
        **{f"{k}_after": after[k] for k in keys},
    }


def table(results: list[dict[str, Any]]) -> str:
    """Return the results as a Markdown table."""
    lines = [
        "| stack | lr | trainable | loss | exact match | two-way accuracy |",
        "|---|---|---|---|---|---|",
    ]
    for r in results:
        pairs = [f"{r[f'{k}_before']:.3f} → {r[f'{k}_after']:.3f}" for k in ("loss", "exact_match", "accuracy")]
        rates = ", ".join(f"{lr:g}" for lr in r["lr"])
        lines.append(f"| {r['stack']} | {rates} | {r['trainable_parameters']:,} | {' | '.join(pairs)} |")
    return "\n".join(lines)


def main() -> None:
    """Run the chosen stacks."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--stacks", nargs="*", default=list(STACKS), choices=list(STACKS))
    parser.add_argument("--steps", type=int, default=80)
    parser.add_argument("--rows", type=int, default=200)
    parser.add_argument("--out", type=Path, default=Path("runs/methods"))
    options = parser.parse_args()
    data = prepare()
    results = []
    for name in options.stacks:
        results.append(run(name, STACKS[name](), data, options.out, options.steps, options.rows))
        print(table(results), flush=True)
    if options.stacks == list(STACKS):
        atomic_write_text(RESULTS, json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
