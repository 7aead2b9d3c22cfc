"""Rows of several tasks: gradients are those of each task's rows, a task added later leaves the first alone."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from graftwork.data import SFTDataModule
from graftwork.errors import ConfigError, DataError
from graftwork.models import GPT
from graftwork.peft import PromptTuning, PTuning
from tests.helpers import tiny_run
from tests.helpers.tiny_run import finetune

TEMPLATES = {"mood": "Review: {input}\nSentiment:", "end": "{input} ends with"}
ANSWERS = {"mood": ["positive", "negative"], "end": ["sun", "film", "girl"]}
BATCHES: dict[str, dict[str, Any]] = {
    "padded": {"micro_batch_size": 4},
    "packed": {"packing": True, "seq_length": 64, "micro_batch_size": 1, "global_batch_size": 2},
}


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with files of each task's rows, of all rows and of a row too many, and a tokenizer."""
    root = tiny_run.write_data(tmp_path_factory.mktemp("tasks"))
    found = {
        task: [{"input": f"story {i} of the {a}", "output": a, "task": task} for i in range(4) for a in answers]
        for task, answers in ANSWERS.items()
    }
    both = [row for pair in zip(*found.values()) for row in pair]
    for name, part in {**found, "both": both, "odd": [*both, {"input": "x", "output": "y", "task": "moo"}]}.items():
        (root / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
    return root


def data(rows: Path, name: str, **options: Any) -> SFTDataModule:
    settings = {"prompt_template": TEMPLATES, "seq_length": 48, "global_batch_size": 4, "micro_batch_size": 4} | options
    return SFTDataModule(
        train=str(rows / f"{name}.jsonl"), tokenizer=str(rows / "tokenizer"), cache_dir=str(rows / "cache"), **settings
    )


def model(tasks: dict[str, int] | None = None) -> GPT:
    """Return a built model with a prompt of each kind for every task."""
    found = tiny_run.model()
    found.configure_model()
    if tasks is not None:
        found.add_adapter(PTuning("p", embedding_dim=8, bottleneck_dim=8, init_std=0.3, tasks=dict(tasks)))
        found.add_adapter(PromptTuning("q", tasks=dict(tasks)))
    return found


def gradients(trained: GPT, rows: Path, name: str, kind: str) -> dict[str, Tensor]:
    """Return the gradients of the summed loss over a whole file."""
    module = data(rows, name, **BATCHES[kind]).attach(prompt_layout=trained.prompt_layout, tokenizer=None)
    module.files["test"] = module.files["train"]
    trained.zero_grad()
    for batch in module.test_dataloader():
        for part in batch.microbatches():
            output, loss = trained.forward_step(iter([part]), trained.chunks[0])
            loss(output)[0].backward()
    return {n: p.grad.clone() for n, p in trained.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("kind", BATCHES)
def test_gradients_of_mixed_batches_are_the_sums_of_each_tasks_own(kind: str, rows: Path) -> None:
    trained = model({"mood": 3, "end": 5})
    whole, parts = gradients(trained, rows, "both", kind), []
    limits = len((rows / "both.jsonl").read_text().splitlines()) // 2
    for task in ANSWERS:
        lines = (rows / f"{task}.jsonl").read_text().splitlines()[:limits]
        (rows / f"{task}-alone.jsonl").write_text("\n".join(lines) + "\n")
        parts.append(gradients(trained, rows, f"{task}-alone", kind))
    for name, gradient in whole.items():
        (task,) = (t for t in ANSWERS if f".tasks.{t}." in name)
        own, other = (parts[list(ANSWERS).index(t)][name] for t in (task, next(o for o in ANSWERS if o != task)))
        assert not other.any() and own.any()
        assert torch.allclose(gradient, own, rtol=1e-4, atol=1e-5 * float(own.abs().max())), name


def test_a_task_trained_later_leaves_the_first_as_it_was_and_a_resumed_run_ends_alike(
    rows: Path, tmp_path: Path
) -> None:
    def trainer(path: Path, steps: int) -> Any:
        return tiny_run.trainer(path, max_steps=steps, val_check_interval=None, enable_progress_bar=False)

    first = model({"mood": 3})
    finetune(first, trainer(tmp_path / "a", 3), data(rows, "mood", prompt_template=TEMPLATES["mood"]))

    def second() -> GPT:
        found = model()
        found.load_adapters(tmp_path / "a" / "adapter")
        for name in "pq":
            found.add_tasks(name, {"end": 2})
        found.train_tasks("p", ["end"])
        return found

    once, again, resumed = second(), second(), second()
    was = {t.key: t.value.clone() for name in "pq" for t in first.stack.tensors(name)}
    options, optim = {"prompt_template": TEMPLATES["end"]}, tiny_run.optim(schedule="constant")
    finetune(once, trainer(tmp_path / "once", 4), data(rows, "end", **options), optim=optim)
    finetune(again, trainer(tmp_path / "twice", 2), data(rows, "end", **options), optim=optim)
    finetune(resumed, trainer(tmp_path / "twice", 4), data(rows, "end", **options), optim=optim)
    now, same = ({t.key: t.value for name in "pq" for t in m.stack.tensors(name)} for m in (once, resumed))
    assert all(torch.equal(now[key], value) for key, value in was.items())
    assert now.keys() == same.keys() and all(torch.equal(now[key], same[key]) for key in now)
    config = json.loads((tmp_path / "once" / "adapter" / "adapter_config.json").read_text())
    assert config["adapters"][0]["prompt"]["prompt_template"] == TEMPLATES
    with pytest.raises(ConfigError, match="add_eos=False, but its tasks mood were trained with True"):
        finetune(second(), trainer(tmp_path / "other", 1), data(rows, "end", add_eos=False, **options))


def test_training_rows_of_an_unknown_task_are_refused(rows: Path, tmp_path: Path) -> None:
    trainer = tiny_run.trainer(tmp_path, max_steps=1, val_check_interval=None, enable_progress_bar=False)
    with pytest.raises(DataError, match=r"line 17: the row has the unknown task 'moo', .* did you mean 'mood'"):
        finetune(model({"mood": 3, "end": 5}), trainer, data(rows, "odd"))
