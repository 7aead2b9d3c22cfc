"""Every method on real data: SmolLM2-135M on movie sentiment, held-out figures before and after, over several seeds.

`make bench-methods` runs it. Learning rates and initial values are the methods' own defaults. The figures of each run
go to ``benchmarks/results/methods.json`` and into docs/methods.md as soon as they are there; what stands in the file,
of as many steps and rows, is not measured again: delete it to measure anew.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl

from graftwork import models
from graftwork.atomic import atomic_write_text
from graftwork.data import SFTDataModule
from graftwork.inference import evaluate_model
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
from graftwork.training import MegatronStrategy, finetune

sys.path.insert(0, str(Path(__file__).parents[1] / "examples" / "sentiment"))
from prepare import prepare

ROOT = Path(__file__).parents[1]
BASE, TEMPLATE = "smollm2_135m", "Review: {input} Sentiment:"
RESULTS = ROOT / "benchmarks" / "results" / "methods.json"
PAGE = ROOT / "docs" / "methods.md"
BEGIN, END = "<!-- figures: written by `make bench-methods` -->", "<!-- end of figures -->"
TOKENS = 128
"""Of the packed row that is a step."""
FIGURES = ("loss", "exact_match", "accuracy")
STACKS: dict[str, Callable[[], list[PEFT]]] = {
    "LoRA": lambda: [LoRA(dim=8, alpha=16)],
    "CanonicalLoRA": lambda: [CanonicalLoRA(dim=8, alpha=16)],
    "DoRA": lambda: [DoRA(dim=8, alpha=16)],
    "CanonicalAdapter": lambda: [CanonicalAdapter(dim=16)],
    "IA3": lambda: [IA3()],
    "PTuning, mlp": lambda: [PTuning()],
    "PTuning, lstm": lambda: [PTuning(encoder="lstm")],
    "PromptTuning": lambda: [PromptTuning(virtual_tokens=20)],
    "Selective, norms": lambda: [Selective(patterns=["norm"])],
    "PTuning + CanonicalAdapter": lambda: [PTuning(), CanonicalAdapter(dim=16)],
    "LoRA + IA3": lambda: [LoRA(dim=8, alpha=16), IA3()],
    "LoRA + Selective, norms": lambda: [LoRA(dim=8, alpha=16), Selective(patterns=["norm"])],
}


def rows_of(data: Path, seed: int) -> SFTDataModule:
    """Return the reviews, in the order of ``seed``."""
    return SFTDataModule(
        train=str(data / "train.jsonl"),
        validation=str(data / "validation.jsonl"),
        test=str(data / "test.jsonl"),
        prompt_template=TEMPLATE,
        seq_length=TOKENS,
        packing=True,
        global_batch_size=1,
        micro_batch_size=1,
        seed=seed,
    )


def trainer_in(out: Path, steps: int) -> pl.Trainer:
    """Return a trainer of ``steps`` steps that keeps everything in ``out``."""
    return pl.Trainer(
        strategy=MegatronStrategy(),
        accelerator="cpu",
        devices=1,
        max_steps=steps,
        val_check_interval=max(1, steps // 2),
        check_val_every_n_epoch=None,
        num_sanity_val_steps=0,
        gradient_clip_val=1.0,
        enable_progress_bar=False,
        default_root_dir=out,
    )


def run(name: str, seed: int, data: Path, out: Path, steps: int, rows: int) -> dict[str, Any]:
    """Fine-tune once and return the held-out figures, the sizes and the speed."""
    stack, sft = STACKS[name](), rows_of(data, seed)
    trainer = trainer_in(out, steps)
    model = models.load(BASE, trainer=trainer, dtype="auto", seed=seed)
    optim = AdamW(warmup_steps=max(1, steps // 6), schedule="linear")
    started = time.process_time()
    summary = finetune(model, trainer, sft, peft=stack, optim=optim, resume=False)
    seconds = time.process_time() - started
    best = models.load(BASE, dtype="auto")
    best.load_adapters(summary["adapter_path"])
    after = evaluate_model(best, sft, split="test", limit=rows)
    return {
        "lr": [transform.default_lr for transform in stack],
        "trainable_parameters": summary["trainable_parameters"],
        "artifact_bytes": sum(file.stat().st_size for file in Path(summary["adapter_path"]).iterdir()),
        "cpu_seconds_per_step": seconds / steps,
        **{figure: after[figure] for figure in FIGURES},
    }


def base_figures(data: Path, rows: int) -> dict[str, Any]:
    """Return the held-out figures of the base alone."""
    found = evaluate_model(models.load(BASE, dtype="auto"), rows_of(data, 1234), split="test", limit=rows)
    return {figure: found[figure] for figure in FIGURES}


def markdown(results: dict[str, Any]) -> str:
    """Return the results as a Markdown table: the mean over the seeds, with the standard deviation."""
    base, steps, rows = (results[key] for key in ("base", "steps", "rows"))
    lines = [
        f"{steps} steps of 1 row of {TOKENS} tokens, packed with movie reviews, on SmolLM2-135M; defaults of each "
        f"method, mean ± standard deviation over the seeds, {rows} held-out reviews. "
        f"The base says a right answer in {100 * base['exact_match']:.0f} %, "
        f"and of the two labels prefers the right one in {100 * base['accuracy']:.0f} % (loss {base['loss']:.2f}).",
        "",
        "| stack | lr | trained | artifact | seeds | exact match | two-way accuracy | loss | tokens a CPU second |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    measured = [name for name in STACKS if results["stacks"].get(name)]
    return "\n".join([*lines, *(_line(name, list(results["stacks"][name].values())) for name in measured)])


def _line(name: str, runs: Sequence[dict[str, Any]]) -> str:
    first = runs[0]
    rates = ", ".join(f"{lr:g}" for lr in first["lr"])
    size = f"{first['artifact_bytes'] / 1e6:.2f} MB"
    match, accuracy = (_spread([100 * r[figure] for r in runs], ".1f") + " %" for figure in ("exact_match", "accuracy"))
    speed = TOKENS / statistics.mean(r["cpu_seconds_per_step"] for r in runs)
    loss = _spread([r["loss"] for r in runs], ".3f")
    trained = f"{first['trainable_parameters']:,}"
    return f"| {name} | {rates} | {trained} | {size} | {len(runs)} | {match} | {accuracy} | {loss} | {speed:.0f} |"


def _spread(values: Sequence[float], form: str) -> str:
    mean = format(statistics.mean(values), form)
    return f"{mean} ± {format(statistics.stdev(values), form)}" if len(values) > 1 else mean


def write(results: dict[str, Any], page: Path = PAGE) -> None:
    """Keep the results, and replace what stands between the markers of the page."""
    atomic_write_text(RESULTS, json.dumps(results, indent=2) + "\n")
    before, rest = page.read_text().split(BEGIN)
    page.write_text(f"{before}{BEGIN}\n\n{markdown(results)}\n\n{END}{rest.split(END)[1]}")


def kept(steps: int, rows: int) -> dict[str, Any]:
    """Return the results of earlier runs of as many steps and rows, which ``main`` adds to."""
    found: dict[str, Any] = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    same = (found.get("steps"), found.get("rows")) == (steps, rows)
    return found if same else {"steps": steps, "rows": rows, "stacks": {}}


def main() -> None:
    """Run the chosen stacks, one seed after another, so that what is there early is whole."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--stacks", nargs="*", default=list(STACKS), choices=list(STACKS))
    parser.add_argument("--seeds", nargs="*", type=int, default=[1, 2, 3])
    parser.add_argument("--steps", type=int, default=80)
    parser.add_argument("--rows", type=int, default=100)
    parser.add_argument("--out", type=Path, default=Path("runs/methods"))
    options = parser.parse_args()
    data, results = prepare(), kept(options.steps, options.rows)
    if "base" not in results:
        results["base"] = base_figures(data, options.rows)
    for seed in options.seeds:
        for name in options.stacks:
            figures = results["stacks"].setdefault(name, {})
            if str(seed) not in figures:
                out = options.out / f"{name.replace(', ', '-').replace(' + ', '-')}-{options.steps}-{seed}"
                figures[str(seed)] = run(name, seed, data, out, options.steps, options.rows)
                write(results)
    print(markdown(results))


if __name__ == "__main__":
    main()
