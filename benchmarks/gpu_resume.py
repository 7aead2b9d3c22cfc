"""A run that stops on the CPU and goes on on another device ends with the adapter of the run that did not stop."""

import json
import shutil
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

STEPS, STOP = 4, 2
TOLERANCE = 1e-4
"""Furthest that a trained value may be apart, relative to the largest of its tensor."""
WORDS = ("sun", "film", "girl", "story", "about", "the", "good", "bad", "?")


def write_reference(folder: Path) -> None:
    """Run all steps, and put a copy of the state in the middle where the other device goes on."""
    _write_data(folder)
    run(folder, folder / "whole")
    state = f"checkpoints/step-{STOP:08}"
    shutil.copytree(folder / "whole" / state, folder / "resumed" / state)


def go_on(folder: Path) -> dict[str, Any]:
    """Go on on this process's device; return how far its adapter is from that of the run that did not stop."""
    run(folder, folder / "resumed")
    found, wanted = (load_file(_adapter(folder / name)) for name in ("resumed", "whole"))
    apart = max(float((found[key] - wanted[key]).abs().max() / wanted[key].abs().max()) for key in wanted)
    return {"case": f"resumed at step {STOP} of {STEPS}", "furthest": apart, "ok": apart <= TOLERANCE}


def run(folder: Path, directory: Path) -> None:
    """Train a LoRA, on a GPU where there is one."""
    import torch
    from lightning.pytorch import Trainer

    from graftwork.data import SFTDataModule
    from graftwork.models import GPT
    from graftwork.models.shapes import Shape
    from graftwork.optim import AdamW
    from graftwork.peft import LoRA
    from graftwork.training import MegatronStrategy, finetune
    from graftwork.training.callbacks import TrainingState

    shape = Shape(2, 64, 96, 4, len(WORDS) + 3, 64, num_query_groups=2)
    trainer = Trainer(
        accelerator="gpu" if torch.cuda.is_available() else "cpu",
        devices=1,
        strategy=MegatronStrategy(),
        max_steps=STEPS,
        val_check_interval=STEPS,
        check_val_every_n_epoch=None,
        default_root_dir=directory,
        callbacks=[TrainingState(every_n_steps=STOP, every_n_minutes=None, keep=STEPS)],
        enable_progress_bar=False,
    )
    data = SFTDataModule(
        train=str(folder / "train.jsonl"),
        tokenizer=str(folder / "tokenizer"),
        cache_dir=str(folder / "cache"),
        validation_fraction=0.25,
        seq_length=32,
        global_batch_size=4,
        micro_batch_size=2,
    )
    model = GPT(shape, checkpoint=_base(folder, shape), dtype="fp32")
    finetune(model, trainer, data, [LoRA(dim=4)], AdamW(lr=5e-3, warmup_steps=1))


def _base(folder: Path, shape: Any) -> str:
    """Return base weights in a file: random ones would be drawn by the device's own generator."""
    from graftwork.models import GPT

    base = folder / "resume-base"
    if not base.is_dir():
        model = GPT(shape, dtype="fp32")
        model.configure_model()
        model.export_hf(base)
    return str(base)


def _adapter(directory: Path) -> Path:
    return next((directory / "adapter").glob("*.safetensors"))


def _write_data(folder: Path) -> None:
    names = ("<s>", "</s>", "<unk>", *WORDS)
    words = Tokenizer(models.WordLevel({word: number for number, word in enumerate(names)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    tokenizer.save_pretrained(folder / "tokenizer")
    rows = [{"input": f"the {a} about the {b} ?", "output": "good" if a < b else "bad"} for a in WORDS for b in WORDS]
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
