"""Ranks that have less to do than others: no trainable parameter, no answer token, fewer validation rows."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from graftwork import parallel
from graftwork.batch import IGNORED
from graftwork.data.sft import SFTDataModule
from graftwork.models import GPT
from graftwork.models.weights import read_config, shape_from_hf
from graftwork.peft import LoRA
from tests.helpers.distributed import run_ranks
from tests.helpers.standin import trainer_for
from tests.helpers.tiny_hf import make_tiny
from tests.helpers.tiny_tokenizer import tiny_tokenizer
from tests.parallel.cells import Outcome
from tests.parallel.compare import assert_faithful, differences
from tests.parallel.layouts import LAYOUTS, Cell
from tests.parallel.models import model_of
from tests.parallel.rows import MICRO, STEPS, global_batch

ROWS = 11
"""Two batches of four rows and one of three."""
VOCABULARY = 301


@pytest.mark.processes
@pytest.mark.parametrize(("layout", "cell"), [("pp2", Cell("llama", "ptuning"))])
def test_a_rank_without_trainable_parameters(
    layout: str, cell: Cell, in_layout: Callable[..., list[Outcome]], one_process: Callable[[Cell], Outcome]
) -> None:
    """P-tuning trains on the first stage only; the last one still sends gradients back and knows loss and norm."""
    first, last = in_layout(layout, cell)
    assert first.weights and not last.weights and not last.gradients
    assert len(last.losses) == STEPS and min(last.norms) > 0
    assert_faithful(differences([first, last], one_process(cell)))


def test_the_matrix_holds_steps_in_which_replicas_and_microbatches_have_no_answer(checkpoints: Path) -> None:
    model = model_of(Cell("llama", "full"), checkpoints)
    answers = [(global_batch(model, step).labels != IGNORED).sum(1) for step in range(STEPS)]
    assert all(step[0::2].sum() != step[1::2].sum() for step in answers)
    assert answers[1][1::2].sum() == 0 and answers[1][:MICRO].sum() == 0 and answers[1].sum() > 0


def write_rows(root: Path) -> Path:
    """Write a tokenizer and ROWS rows of very different lengths."""
    tiny_tokenizer(root / "tokenizer", VOCABULARY)
    make_tiny("llama", root / "base", vocab_size=VOCABULARY)
    rows = [{"input": f"Question {i} about " + "the sun " * (i % 4), "output": "yes " * (1 + i)} for i in range(ROWS)]
    (root / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return root


def base(root: Path) -> GPT:
    directory = root / "base"
    return GPT(shape_from_hf(read_config(directory)), checkpoint=str(directory))


def rows_in(root: Path, packing: bool, batch: int = 4) -> SFTDataModule:
    path = str(root / "rows.jsonl")
    return SFTDataModule(
        train=path,
        validation=path,
        tokenizer=str(root / "tokenizer"),
        cache_dir=str(root / "cache"),
        seq_length=64,
        global_batch_size=batch,
        micro_batch_size=1,
        packing=packing,
    )


def validate(rank: int, world: int, layouts: list[dict[str, Any]], root: Path) -> list[float]:
    """Return the validation loss in every layout, padded, then packed."""
    found = []
    for sizes in layouts:
        for packing in (False, True):
            model = base(root)
            model.add_adapter(LoRA(dim=2))
            trainer = trainer_for(sizes, world, rank)
            (metrics,) = trainer.validate(model, datamodule=rows_in(root, packing), verbose=False)
            found.append(metrics["val_loss"])
    return found


@pytest.mark.fault(
    "an uneven last batch hangs ranks, or drops rows",
    "fills keep the ranks in step and have no labels",
)
@pytest.mark.processes
def test_an_uneven_last_validation_batch_counts_every_row_once(tmp_path: Path) -> None:
    root = write_rows(tmp_path)
    wanted = plain_validation_loss(root)
    ranks = run_ranks(validate, 2, [LAYOUTS[name].sizes for name in ("dp2", "pp2", "cp2")], root, timeout=180)
    for losses in [*ranks, validate(0, 1, [{}], root)]:
        assert losses == pytest.approx([wanted] * len(losses), rel=1e-6)
    parallel.destroy()


def plain_validation_loss(root: Path) -> float:
    """Return the mean over all answer tokens, one row at a time, each of them once."""
    model, data = base(root), rows_in(root, packing=False, batch=1)
    model.configure_model()
    data.attach(prompt_layout=model.prompt_layout)
    data.setup("validate")
    total, tokens, seen = 0.0, 0, []
    for batch in data.val_dataloader():
        with torch.no_grad():
            logits = model(batch.tokens)
        total += float(F.cross_entropy(logits.flatten(0, 1), batch.labels.flatten(), reduction="sum"))
        tokens += int((batch.labels != IGNORED).sum())
        seen += batch.rows.flatten().tolist()
    assert sorted(seen) == list(range(ROWS))
    parallel.destroy()
    return total / tokens
