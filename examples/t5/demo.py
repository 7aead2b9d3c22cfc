"""T5 in three minutes on a CPU, without a download: one small base, two tasks, and the first never changes.

python examples/t5/demo.py

A T5 of two layers each learns a toy language: what to do with a sentence stands in front of it (deny, ask, repeat); a
sentence alone is repeated. It is kept in --out. Then eight virtual tokens for each task learn to say what the words
did, while the base stays frozen: first for task "deny", later, beside it, for task "ask".
"""

import argparse
import itertools
import json
import random
import sys
from collections.abc import Iterator
from pathlib import Path

import lightning.pytorch as pl
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from graftwork.data import SFTDataModule
from graftwork.errors import GraftworkError
from graftwork.inference import evaluate_model, sample_answers, side_by_side
from graftwork.models import T5, load, shapes
from graftwork.optim import AdamW
from graftwork.peft import PTuning

OWNERS, KINDS = ("the", "my", "your", "our"), ("old", "small", "quick", "tired", "happy")
ANIMALS = ("dog", "cat", "cow", "yak", "hen", "fox", "owl", "bee")
CAN, DO = ("can", "will", "must", "does"), ("run", "sleep", "sing", "swim", "wait")
WHERE = ("", "near the house", "in the garden")
TASKS = ("deny", "ask")
Row = dict[str, str]


def sentences(seed: int = 0) -> list[tuple[str, ...]]:
    """Return all sentences of the language in a fixed random order."""
    found = list(itertools.product(OWNERS, KINDS, ANIMALS, CAN, DO, WHERE))
    random.Random(seed).shuffle(found)
    return found


def done(task: str, parts: tuple[str, ...]) -> str:
    """Return what a task makes of a sentence."""
    owner, kind, animal, can, do, where = parts
    about, rest = f"{owner} {kind} {animal}", f"{do} {where}".strip()
    made = {"deny": f"{about} {can} not {rest}", "ask": f"{can} {about} {rest} ?"}
    return made.get(task, f"{about} {can} {rest}")


def tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer of whole words that ends every text, as T5's does."""
    words = ["<pad>", "</s>", "<unk>", "not", "?", "repeat", *TASKS, *OWNERS, *KINDS, *ANIMALS, *CAN, *DO]
    words += ["near", "in", "house", "garden"]
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", pad_token="<pad>", unk_token="<unk>")


def write(path: Path, rows: Iterator[Row] | list[Row]) -> str:
    """Write rows and return where."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def fit(model: T5, path: str, out: Path, steps: int, lr: float) -> None:
    """Train whatever of the model trains."""
    data = SFTDataModule(path, seq_length=32, global_batch_size=32, micro_batch_size=32, cache_dir=str(out / "cache"))
    model.prepare(optim=AdamW(lr=lr, warmup_steps=max(1, steps // 10), schedule="linear"))
    trainer = pl.Trainer(
        max_steps=steps, max_epochs=-1, accelerator="cpu", logger=False, enable_checkpointing=False,
        enable_model_summary=False, default_root_dir=out,
    )  # fmt: skip
    trainer.fit(model, datamodule=data)


def base(out: Path, steps: int) -> Path:
    """Return the base checkpoint: that of an earlier run, or a new one (under 4 MB)."""
    directory = out / f"base-{steps}"
    if (directory / "config.json").exists():
        return directory
    words = tokenizer()
    sizes = {"num_layers": 2, "hidden_size": 128, "ffn_hidden_size": 256, "num_attention_heads": 4, "kv_channels": 32}
    model = T5(shapes.t5v11_small(num_decoder_layers=2, vocab_size=len(words), **sizes), dtype="fp32")
    model.tokenizer = words
    rows = [
        {"input": f"{task} {done('', parts)}".strip(), "output": done(task, parts)}
        for parts in sentences()[:4000]
        for task in random.Random(str(parts)).sample([*TASKS, "repeat", ""], 2)
    ]
    fit(model, write(out / "base.jsonl", rows), out, steps, 3e-3)
    model.export_hf(directory)
    words.save_pretrained(directory)
    return directory


def rows_of(task: str, chosen: list[tuple[str, ...]]) -> list[Row]:
    """Return a task's rows; nothing in a sentence says which task it is."""
    return [{"task": task, "input": done("", parts), "output": done(task, parts)} for parts in chosen]


def kept(model: T5, task: str, held_out: str) -> tuple[dict[str, torch.Tensor], list[list[int]]]:
    """Return copies of a task's tensors, and the model's answers to its held-out rows."""
    tensors = {name: t.detach().clone() for name, t in model.named_parameters() if f".{task}." in name}
    assert tensors, f"no tensor belongs to {task}"
    asked = [question for batch in questions(model, held_out) for question in batch]
    return tensors, model.generate(asked, 16)


def questions(model: T5, path: str) -> Iterator[list[list[int]]]:
    """Yield the prompts of a file, as the model is asked them."""
    data = SFTDataModule(predict=path, seq_length=32, micro_batch_size=8, global_batch_size=8)
    data.attach(model.tokenizer, model.prompt_layout, decoder_start=model.sizes.decoder_start_token_id)
    yield from ([list(prompt) for prompt in batch.prompts] for batch in data.predict_dataloader())


def exact(model: T5, path: str) -> float:
    """Return the share of held-out rows that the model answers exactly."""
    return evaluate_model(model, path)["exact_match"]


def main() -> None:
    """Train the base once, then one task, then the other beside it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/t5"))
    parser.add_argument("--base-steps", type=int, default=500)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--rows", type=int, default=100, help="held-out rows of each task")
    options = parser.parse_args()
    out, fresh = options.out, sentences()[4000:]
    held = {task: write(out / f"{task}-test.jsonl", rows_of(task, fresh[: options.rows])) for task in TASKS}
    model = load(str(base(out, options.base_steps)), dtype="fp32")
    model.configure_model()
    before = {task: exact(model, held[task]) for task in TASKS}
    old = sample_answers(model, SFTDataModule(test=held["deny"], seq_length=32), count=2)
    model.add_adapter(PTuning(name="prompts", tasks={"deny": 8}, embedding_dim=64, bottleneck_dim=64))
    fit(model, write(out / "deny.jsonl", rows_of("deny", fresh[options.rows :][:800])), out, options.steps, 1e-2)
    first = kept(model, "deny", held["deny"])
    model.add_tasks("prompts", {"ask": 8})
    fit(model, write(out / "ask.jsonl", rows_of("ask", fresh[options.rows :][:800])), out, options.steps, 1e-2)
    again = kept(model, "deny", held["deny"])
    same = first[1] == again[1] and all(torch.equal(tensor, again[0][name]) for name, tensor in first[0].items())
    after = {task: exact(model, held[task]) for task in TASKS}
    model.save_adapters(out / "adapter")
    print(side_by_side(old, sample_answers(model, SFTDataModule(test=held["deny"], seq_length=32), count=2)))
    for task in TASKS:
        print(f"{task}: exact match {before[task]:.2f} -> {after[task]:.2f}")
    print(f"deny after ask was learned: {'every bit as before' if same else 'CHANGED'}; adapter in {out / 'adapter'}")
    if not same:
        raise SystemExit(1)


if __name__ == "__main__":
    try:
        main()
    except GraftworkError as error:
        sys.exit(f"error: {error}")
