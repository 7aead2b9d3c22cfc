"""The quick start on LightningModules as one script: train two adapters together, load them again, predict.

python examples/quickstart.py                                        # SmolLM2 135M on a few reviews, three minutes
python examples/quickstart.py --train mine.jsonl --steps 100         # your rows: {"input": ..., "output": ...}
"""

import argparse
import json
import sys
from pathlib import Path

import lightning.pytorch as pl

from graftwork import models
from graftwork.data import SFTDataModule
from graftwork.errors import GraftworkError
from graftwork.optim import AdamW
from graftwork.peft import CanonicalAdapter, PTuning
from graftwork.training.callbacks import AdapterCheckpoint

GOOD = ("warm", "funny", "moving", "brilliant", "charming", "clever", "wonderful", "tender")
BAD = ("dull", "noisy", "tiresome", "empty", "predictable", "clumsy", "shallow", "dreary")
THINGS = ("picture about friendship", "sequel", "story of two sisters", "thriller", "comedy", "debut")


def reviews(path: Path) -> Path:
    """Write made-up reviews with their sentiment: enough to see a model learn, not a data set."""
    rows = [
        {"input": f"a {word} {thing}", "output": sentiment}
        for sentiment, words in (("positive", GOOD), ("negative", BAD))
        for word in words
        for thing in THINGS
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def main() -> None:
    """Train, load, predict."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", default="smollm2_135m", help="what models.load takes")
    parser.add_argument("--train", type=Path, help="JSONL, CSV or Parquet; default: a few made-up reviews")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--out", type=Path, default=Path("runs/quickstart"))
    options = parser.parse_args()

    data = SFTDataModule(
        train=str(options.train or reviews(options.out / "reviews.jsonl")),
        validation_fraction=0.2,  # by each row's content; predict answers these rows
        prompt_template="Review: {input} Sentiment:",
        seq_length=256,
        micro_batch_size=8,
    )
    trainer = pl.Trainer(
        max_steps=options.steps,
        val_check_interval=max(1, options.steps // 3),
        check_val_every_n_epoch=None,
        default_root_dir=options.out,
        callbacks=[AdapterCheckpoint()],
        logger=False,
        enable_model_summary=False,
    )

    model = models.load(options.base, trainer=trainer, dtype="auto")
    model.add_adapter([PTuning(virtual_tokens=10), CanonicalAdapter(dim=32)])  # remove for full fine-tuning
    model.optim = AdamW(warmup_steps=10)  # without a warm-up P-tuning's first steps can lose the prompt altogether
    trainer.fit(model, datamodule=data)

    model = models.load(options.base, trainer=trainer, dtype="auto")
    model.load_adapters(options.out / "adapter")
    model.freeze()
    model.generation = {"max_new_tokens": 4}
    answers = [row for batch in trainer.predict(model, datamodule=data) or [] for row in batch]
    for row in answers[:6]:
        print(f"{row['input']:<35} {row['output']:<12} expected {row['expected']}")
    right = sum(row["output"] == row["expected"] for row in answers)
    print(f"{right} of {len(answers)} held-out rows answered exactly; the adapters are in {options.out / 'adapter'}")


if __name__ == "__main__":
    try:
        main()
    except GraftworkError as error:
        sys.exit(f"error: {error}")
