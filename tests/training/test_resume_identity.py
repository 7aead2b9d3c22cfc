"""A state goes on in its own run only: each change of the mathematics is refused by name, each harmless one is told."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from graftwork.errors import CheckpointError, ConfigError
from graftwork.models.gpt import GPT
from graftwork.peft import IA3, LoRA
from graftwork.training.callbacks import TrainingState
from graftwork.training.run_directory import latest
from graftwork.training.state import checkpoint
from tests.helpers import tiny_run
from tests.helpers.tiny_run import finetune


class Run:
    """A run of one step; a test changes its arguments, then starts it again in the same directory."""

    def __init__(self, root: Path) -> None:
        self.root, self.base, self.files = root / "run", root / "base", root / "data"
        self.model: dict[str, Any] = {}
        self.shape: dict[str, Any] = {}
        self.data: dict[str, Any] = {}
        self.peft: list[Any] = [LoRA(dim=4, alpha=8)]
        self.optim: dict[str, Any] = {}
        self.trainer: dict[str, Any] = {"max_steps": 1, "limit_val_batches": 0, "enable_progress_bar": False}
        self.rest: dict[str, Any] = {}

    def start(self, **rest: Any) -> dict[str, Any]:
        """Run, return what trains."""
        trainer = tiny_run.trainer(self.root, **self.trainer)
        shape = type(tiny_run.SHAPE)(**{**vars(tiny_run.SHAPE), **self.shape})
        model = GPT(shape, **{"checkpoint": str(self.base), **self.model})
        data = tiny_run.data_module(self.files, **self.data)
        finetune(model, trainer, data, self.peft, tiny_run.optim(**self.optim), **{**self.rest, **rest})
        return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a base, data and a run that has made one step."""
    root = tmp_path_factory.mktemp("saved")
    (root / "data").mkdir()
    tiny_run.write_data(root / "data")
    base = tiny_run.model(seed=5)
    base.configure_model()
    base.export_hf(root / "base")
    Run(root).start(recipe_text="peft[0].alpha = 8\ntrainer.callbacks = []")
    return root


@pytest.fixture
def again(saved: Path, tmp_path: Path) -> Run:
    shutil.copytree(saved, tmp_path / "copy")
    return Run(tmp_path / "copy")


def other_weights(run: Run) -> None:
    file = run.base / "model.safetensors"
    tensors = load_file(file)
    tensors["model.norm.weight"][3] += 1e-3
    save_file(tensors, file, metadata={"format": "pt"})


def other_rows(run: Run) -> None:
    """As many rows, one word of one answer another."""
    file = run.files / "train.jsonl"
    file.write_text(file.read_text().replace("negative, slow", "negative, long", 1))


def rows_swapped(run: Run) -> None:
    file = run.files / "train.jsonl"
    first, second, *rest = file.read_text().splitlines(keepends=True)
    file.write_text("".join([second, first, *rest]))


def other_tokenizer(run: Run) -> None:
    file = run.files / "tokenizer" / "tokenizer.json"
    value = json.loads(file.read_text())
    vocabulary = value["model"]["vocab"]
    a, b = list(vocabulary)[-2:]
    vocabulary[a], vocabulary[b] = vocabulary[b], vocabulary[a]
    file.write_text(json.dumps(value))


def setting(where: str, **values: Any) -> Callable[[Run], None]:
    return lambda run: getattr(run, where).update(values)


def stack(*transforms: Any) -> Callable[[Run], None]:
    return lambda run: setattr(run, "peft", list(transforms))


REFUSED: dict[str, Callable[[Run], None]] = {
    "model.checkpoint": other_weights,
    "model.dtype": setting("model", dtype="bf16"),
    "data.train": other_rows,
    "data.train ": rows_swapped,
    "data.tokenizer": other_tokenizer,
    "data.prompt_template": setting("data", prompt_template="{input}\n"),
    "data.answer_template": setting("data", answer_template="  {output}"),
    "data.add_eos": setting("data", add_eos=False),
    "data.seq_length": setting("data", seq_length=40),
    "data.global_batch_size": setting("data", global_batch_size=4),
    "data.packing": setting("data", packing=True, micro_batch_size=2),
    "data.seed": setting("data", seed=99),
    "data.validation_fraction": setting("data", validation_fraction=0.3),
    "data.too_long": setting("data", too_long="drop"),
    "peft[0].alpha": stack(LoRA(dim=4, alpha=80)),
    "peft[0].dropout": stack(LoRA(dim=4, alpha=8, dropout=0.1)),
    "peft[0].use_rslora": stack(LoRA(dim=4, alpha=8, use_rslora=True)),
    "peft[1]": stack(LoRA(dim=4, alpha=8), IA3()),
    "peft[0]": stack(IA3(name="lora")),
    "optim.lr": setting("optim", lr=1e-3),
    "optim.weight_decay": setting("optim", weight_decay=0.1),
    "optim.beta2": setting("optim", beta2=0.95),
    "optim.eps": setting("optim", eps=1e-6),
    "optim.warmup_steps": setting("optim", warmup_steps=3),
    "optim.schedule": setting("optim", schedule="linear"),
    "trainer.gradient_clip_val": setting("trainer", gradient_clip_val=0.5),
    "trainer.gradient_clip_algorithm": setting("trainer", gradient_clip_algorithm="value"),
    "trainer.overfit_batches": setting("trainer", overfit_batches=2),
    "seed": setting("rest", seed=7),
}


def files(root: Path) -> dict[Path, bytes]:
    """Return what the files of a run hold; a start opens a log of its own."""
    return {p: p.read_bytes() for p in root.rglob("*") if p.is_file() and p.name != ".lock" and "logs" not in p.parts}


@pytest.mark.parametrize("name", REFUSED)
def test_what_changes_the_mathematics_is_refused_by_name(name: str, again: Run) -> None:
    path, field = latest(again.root), name.strip()
    before = files(again.root)
    REFUSED[name](again)
    with pytest.raises(CheckpointError) as refused:
        again.start()
    text = str(refused.value)
    assert text.startswith(f"the training state {str(path)!r} belongs to another run:\n  {field}: ")
    assert f"allow_changes=['{field}'" in text and "resume=False" in text and " -> " in text
    assert files(again.root) == before, "a refused run changes nothing"


def test_resume_false_starts_anew_with_the_change(again: Run) -> None:
    again.peft = [LoRA(dim=4, alpha=80)]
    again.start(resume=False)
    state = checkpoint.read_common(latest(again.root))[1]  # type: ignore[arg-type]
    assert state.identity is not None and state.identity.decides["peft[0].alpha"] == 80


@pytest.mark.parametrize("name", ["model.checkpoint", "data.train", "data.seed", "peft[0].alpha", "optim.lr", "seed"])
def test_what_is_named_may_differ_and_nothing_else(name: str, again: Run, capsys: Any) -> None:
    REFUSED[name](again)
    again.optim["eps"] = 1e-7
    with pytest.raises(CheckpointError, match=r"another run:\n  optim.eps: 1e-08 -> 1e-07\nstart"):
        again.start(allow_changes=[name])
    again.trainer["max_steps"] = 2
    again.start(allow_changes=[name, "optim.eps"])
    told = capsys.readouterr().out
    assert f"{name}: " in told and "optim.eps: 1e-08 -> 1e-07" in told and "max_steps: 1 -> 2" in told
    assert latest(again.root).name == "step-00000002"  # type: ignore[union-attr]
    again.start()  # the new state belongs to the changed run


def test_other_rows_that_are_allowed_are_trained_on(again: Run) -> None:
    """Also when there are more of them: the position counts on."""
    file = again.files / "train.jsonl"
    file.write_text(file.read_text() * 2)
    again.trainer["max_steps"] = 2
    again.start(allow_changes=["data.train"])
    assert latest(again.root).name == "step-00000002"  # type: ignore[union-attr]


def test_a_name_that_is_no_field_is_refused(again: Run) -> None:
    with pytest.raises(ConfigError, match=r"'optim.lrr'.* did you mean 'optim.lr'"):
        again.start(allow_changes=["optim.lrr"])


def moved(run: Run) -> None:
    """Base and data under other paths."""
    run.base, run.files = (Path(shutil.move(p, p.with_name(f"other_{p.name}"))) for p in (run.base, run.files))


HARMLESS: dict[str, tuple[Callable[[Run], None], str]] = {
    "nothing": (lambda run: None, ""),
    "paths": (moved, "data.train (path)"),
    "max_steps": (setting("trainer", max_steps=3), "trainer.max_steps: 1 -> 3"),
    "validation": (
        setting("trainer", val_check_interval=2, limit_val_batches=1.0),
        "trainer.val_check_interval: 4 -> 2",
    ),
    "micro batch": (setting("data", micro_batch_size=4), "data.micro_batch_size: 2 -> 4"),
    "workers": (setting("data", num_workers=1), "data.num_workers: 0 -> 1"),
    "recompute": (setting("model", recompute="full"), "model.recompute"),
    "rhythm": (lambda run: run.trainer.update(callbacks=[TrainingState(every_n_steps=5, keep=1)]), ""),
    "logging": (setting("trainer", log_every_n_steps=9, logger=False), ""),
}


@pytest.mark.parametrize("name", HARMLESS)
def test_what_changes_nothing_is_allowed_and_told(name: str, again: Run, capsys: Any) -> None:
    change, words = HARMLESS[name]
    change(again)
    again.start()
    told = [line for line in capsys.readouterr().out.splitlines() if line.startswith("the training state differs")]
    changed = [part for line in told for part in line.partition(": ")[2].split("; ")]
    known = [part for part in changed if "(path)" not in part]  # every copy of the fixture has its own
    assert any(words in part for part in changed) if words else not known


def test_other_lines_of_the_recipe_are_told(again: Run, capsys: Any) -> None:
    again.start(recipe_text="peft[0].alpha = 8\ntrainer.callbacks = ['mine']")
    assert "trainer.callbacks: '[]' -> \"['mine']\"" in capsys.readouterr().out


def test_a_state_of_the_version_before_goes_on_with_a_note(again: Run, capsys: Any) -> None:
    file = latest(again.root) / "state.json"  # type: ignore[operator]
    state = json.loads(file.read_text())
    file.write_text(json.dumps({k: v for k, v in state.items() if k not in ("identity", "files", "checksum")}))
    again.peft = [LoRA(dim=4, alpha=80)]
    again.start()
    assert "saved by a version that did not keep what run it belongs to" in capsys.readouterr().out


def test_a_changed_state_is_found_by_its_checksums(again: Run) -> None:
    """A value of a moment, in the middle of a file that torch reads without complaint."""
    file = latest(again.root) / "tensors" / "__0_0.distcp"  # type: ignore[operator]
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(bytes(data))
    with pytest.raises(CheckpointError, match="'tensors/__0_0.distcp' was changed: its checksum does not match"):
        again.start()
    assert torch.is_tensor(next(iter(again.start(resume=False).values())))


def preloaded(run: Run, scale: float) -> None:
    """Put an artifact of a LoRA with values of this size beside the run, in place of the one that was there."""
    shutil.rmtree(run.root.parent / "adapter", ignore_errors=True)
    model = GPT(tiny_run.SHAPE, checkpoint=str(run.base))
    model.configure_model()
    model.add_adapter(LoRA(dim=2, name="given"))
    with torch.no_grad():
        for tensor in model.stack.tensors("given"):
            tensor.parameter.fill_(scale)
    model.save_adapters(run.root.parent / "adapter")


def on_top(run: Run, steps: int, **rest: Any) -> None:
    """Train another LoRA on top of the frozen one."""
    model = GPT(tiny_run.SHAPE, checkpoint=str(run.base))
    model.load_adapters(run.root.parent / "adapter", trainable=False)
    trainer = tiny_run.trainer(run.root, max_steps=steps, limit_val_batches=0, enable_progress_bar=False)
    finetune(model, trainer, tiny_run.data_module(run.files), [LoRA(dim=4)], tiny_run.optim(), **rest)


def test_other_values_of_a_frozen_adapter_are_refused(again: Run) -> None:
    """No state holds them: the trained one would go on over another function."""
    shutil.rmtree(again.root)
    preloaded(again, 0.1)
    on_top(again, 1)
    preloaded(again, 0.2)
    with pytest.raises(CheckpointError, match=r"peft\[0\].frozen values: content \w{12} -> content \w{12}"):
        on_top(again, 2)
    preloaded(again, 0.1)
    on_top(again, 2)
    preloaded(again, 0.2)
    on_top(again, 3, allow_changes=["peft[0].frozen values"])


def test_a_state_that_does_not_know_frozen_values_goes_on(again: Run) -> None:
    shutil.rmtree(again.root)
    preloaded(again, 0.1)
    on_top(again, 1)
    path = latest(again.root) / "state.json"  # type: ignore[operator]
    facts = json.loads(path.read_text())
    del facts["identity"]["decides"]["peft[0].frozen values"]
    path.write_text(json.dumps({**facts, "checksum": checkpoint._checksum(facts)}))
    on_top(again, 2)
