"""Resume: interrupted + resumed == uninterrupted, bit for bit; states are whole, few and of this recipe."""

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core.dist_checkpointing.strategies import filesystem_async

from graftwork.errors import CheckpointError, ConfigError
from graftwork.parallel import sharded_files
from graftwork.peft import IA3, LoRA
from graftwork.training.callbacks import Interrupted, Report, TrainingState
from graftwork.training.optimizer.shards import OPTIMIZER
from graftwork.training.run_directory import latest, locked, prune, state_path, states
from graftwork.training.state import checkpoint
from tests.helpers import tiny_run
from tests.helpers.tiny_run import finetune


def run(data: Path, root: Path, stop: int | None = None, peft: Any = "lora", **options: Any) -> dict[str, Any]:
    """Run eight steps, or up to a request to stop; return weights, losses, optimizer and summary."""
    stack = [LoRA(dim=4, dropout=0.1), IA3()] if peft == "lora" else peft
    trainer_options = {k: options.pop(k) for k in ("max_steps", "resume", "callbacks", "allow_changes") if k in options}
    resume, allow = trainer_options.pop("resume", True), trainer_options.pop("allow_changes", None)
    callbacks = [*trainer_options.pop("callbacks", []), *([tiny_run.StopAfter(stop)] if stop else [])]
    trainer = tiny_run.trainer(root, callbacks=callbacks, **trainer_options)
    model_options = {"dtype": options.pop("dtype")} if "dtype" in options else {}
    model = tiny_run.model(**model_options)
    arguments = (model, trainer, tiny_run.data_module(data, **options), stack, tiny_run.optim())
    if stop is None:
        summary = finetune(*arguments, resume=resume, allow_changes=allow)
    else:
        with pytest.raises(Interrupted) as stopped:
            finetune(*arguments, resume=resume, allow_changes=allow)
        assert stopped.value.code == 75
        summary = {}
    report = next(c for c in trainer.callbacks if isinstance(c, Report))
    weights = {n: p.detach().clone() for n, p in model.named_parameters()}
    return {"weights": weights, "train": report.train, "validation": report.validation, "summary": summary}


def assert_same(found: dict[str, Any], wanted: dict[str, Any]) -> None:
    assert found["train"] == wanted["train"]
    assert found["validation"] == wanted["validation"]
    assert all(torch.equal(w, found["weights"][n]) for n, w in wanted["weights"].items())


KINDS: dict[str, dict[str, Any]] = {
    "padded": {},
    "packed": {"packing": True, "seq_length": 64, "micro_batch_size": 1, "global_batch_size": 2},
    "full": {"peft": None},
    "full_bf16": {"peft": None, "dtype": "bf16"},
}


@pytest.mark.parametrize("stop", [3, 4], ids=["between_validations", "at_a_validation"])
@pytest.mark.parametrize("kind", KINDS)
def test_interrupted_and_resumed_equals_uninterrupted(kind: str, stop: int, tiny_data: Path, tmp_path: Path) -> None:
    """Eight steps over 36 rows cross a pass of the data; dropout draws from the restored generators."""
    wanted = run(tiny_data, tmp_path / "whole", **KINDS[kind])
    run(tiny_data, tmp_path / "cut", stop=stop, **KINDS[kind])
    assert latest(tmp_path / "cut") == state_path(tmp_path / "cut", stop)
    found = run(tiny_data, tmp_path / "cut", **KINDS[kind])
    assert_same(found, wanted)
    assert found["summary"]["val_loss"] == wanted["summary"]["val_loss"]


@pytest.mark.fault(
    "the state of the random numbers is not restored",
    "it is in the state; without it the comparison fails",
)
def test_without_the_random_state_the_comparison_would_fail(tiny_data: Path, tmp_path: Path, monkeypatch: Any) -> None:
    """Deliberate break: dropout makes the losses depend on the generators."""
    wanted = run(tiny_data, tmp_path / "whole")
    run(tiny_data, tmp_path / "cut", stop=3)
    monkeypatch.setattr("graftwork.training.state.checkpoint.read_random_state", lambda *_: None)
    assert run(tiny_data, tmp_path / "cut")["train"] != wanted["train"]


def test_a_finished_run_started_again_trains_nothing_and_gives_its_summary(tiny_data: Path, tmp_path: Path) -> None:
    first = run(tiny_data, tmp_path)
    again = run(tiny_data, tmp_path)
    assert_same(again, first)
    changing = ("peak_memory_bytes",)
    assert {k: v for k, v in again["summary"].items() if k not in changing} == {
        k: v for k, v in first["summary"].items() if k not in changing
    }


def test_more_steps_continue_a_finished_run(tiny_data: Path, tmp_path: Path) -> None:
    run(tiny_data, tmp_path, max_steps=4)
    found = run(tiny_data, tmp_path, max_steps=6)
    assert [step for step, _ in found["train"]] == [1, 2, 3, 4, 5, 6]


def test_resume_false_starts_anew(tiny_data: Path, tmp_path: Path) -> None:
    first = run(tiny_data, tmp_path, max_steps=3)
    again = run(tiny_data, tmp_path, max_steps=3, resume=False)
    assert_same(again, first)
    assert [step for step, _ in again["train"]] == [1, 2, 3]


def test_without_validation_data_states_are_saved_too(tiny_data: Path, tmp_path: Path) -> None:
    run(tiny_data, tmp_path, validation_fraction=0.0, callbacks=[TrainingState(every_n_steps=2, keep=9)], max_steps=5)
    assert [p.name[-1] for p in states(tmp_path)] == ["2", "4", "5"]


def test_every_n_steps_and_only_the_newest_are_kept(tiny_data: Path, tmp_path: Path) -> None:
    run(tiny_data, tmp_path, callbacks=[TrainingState(every_n_steps=2, keep=2)])
    assert [p.name for p in states(tmp_path)] == ["step-00000006", "step-00000008"]
    assert {p.name for p in (tmp_path / "checkpoints").iterdir()} == {"step-00000006", "step-00000008"}


def kinds_by_name(root: Path) -> dict[str, set[str]]:
    """Return what the newest state holds of each trained tensor."""
    found: dict[str, set[str]] = {}
    for key in sharded_files.shapes_in(latest(root) / checkpoint.TENSORS):  # type: ignore[operator]
        kind, name = key.removeprefix(OPTIMIZER).split(".", 1) if key.startswith(OPTIMIZER) else ("weight", key)
        found.setdefault(name, set()).add(kind)
    return found


def test_a_state_holds_only_what_trains(tiny_data: Path, tmp_path: Path) -> None:
    run(tiny_data, tmp_path, max_steps=2)
    found = kinds_by_name(tmp_path)
    assert found and all(".adapters." in name for name in found)
    assert all(kinds == {"weight", "exp_avg", "exp_avg_sq"} for kinds in found.values())
    assert json.loads((latest(tmp_path) / "state.json").read_text())["optimizer_step"] == 2  # type: ignore[operator]


@pytest.mark.fault(
    "fp32 masters are not restored on resume",
    "masters are in the state, under their own name",
)
def test_masters_of_bf16_weights_are_in_the_state(tiny_data: Path, tmp_path: Path) -> None:
    run(tiny_data, tmp_path, peft=None, dtype="bf16", max_steps=2)
    found = kinds_by_name(tmp_path)
    assert found and all(kinds == {"weight", "exp_avg", "exp_avg_sq", "master"} for kinds in found.values())


@pytest.mark.fault(
    "a state with another number of optimizer entries is taken by position",
    "tensors have names, and the state keeps what the run was; another stack is refused",
)
@pytest.mark.parametrize(
    ("peft", "allow", "words"),
    [
        ([LoRA(dim=8, dropout=0.1), IA3()], ["peft[0].dim"], r"lora_A' has shape \(4, 32\) .* and \(8, 32\)"),
        ([LoRA(dim=4, dropout=0.1)], ["peft[1]"], "holds '.*ia3.*which the model does not train"),
        ([LoRA(dim=4, dropout=0.1, name="other"), IA3()], ["peft[0].name"], "has no '.*other.*other adapters"),
    ],
)
def test_a_state_of_another_recipe_is_refused(
    peft: Any, allow: list[str], words: str, tiny_data: Path, tmp_path: Path
) -> None:
    """Also where its identity is allowed to differ: its tensors do not fit."""
    run(tiny_data, tmp_path, max_steps=1)
    with pytest.raises(CheckpointError, match="belongs to another run"):
        run(tiny_data, tmp_path, peft=peft, max_steps=2)
    with pytest.raises(CheckpointError, match=words):
        run(tiny_data, tmp_path, peft=peft, max_steps=2, allow_changes=allow)


def test_a_state_of_other_data_is_refused(tiny_data: Path, tmp_path: Path) -> None:
    run(tiny_data, tmp_path, max_steps=1)
    with pytest.raises(CheckpointError, match="data.seed: 1234 -> 99"):
        run(tiny_data, tmp_path, max_steps=2, seed=99)


@pytest.mark.parametrize(
    "file", ["state.json", "trainer.pt", "random-00000.pt", "tensors/__0_0.distcp", "tensors/.metadata"]
)
def test_a_truncated_state_is_one_sentence(file: str, tiny_data: Path, tmp_path: Path) -> None:
    run(tiny_data, tmp_path, max_steps=1)
    path = latest(tmp_path) / file  # type: ignore[operator]
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(CheckpointError, match="delete that directory to resume from the one before"):
        run(tiny_data, tmp_path, max_steps=2)


def test_a_failed_save_leaves_the_state_before_it(tiny_data: Path, tmp_path: Path, monkeypatch: Any) -> None:
    real, saves = checkpoint.sharded_files.save, []

    def no_room(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    def save(state: Any, directory: Path) -> None:
        saves.append(directory)
        if len(saves) == 2:
            monkeypatch.setattr(filesystem_async, "_write_item", no_room)
        real(state, directory)

    monkeypatch.setattr(checkpoint.sharded_files, "save", save)
    with pytest.raises(CheckpointError, match="the disk is full: .*step-00000004' was not written"):
        run(tiny_data, tmp_path, callbacks=[TrainingState(every_n_steps=2)])
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["step-00000002"]
    monkeypatch.undo()
    assert_same(run(tiny_data, tmp_path), run(tiny_data, tmp_path / "whole"))


@pytest.mark.fault(
    "two runs write into one directory",
    "a lock on the directory",
)
def test_a_second_run_in_the_same_directory_is_refused(tiny_data: Path, tmp_path: Path) -> None:
    with locked(tmp_path), pytest.raises(ConfigError, match=rf"another run \(process {os.getpid()} on .*is using"):
        run(tiny_data, tmp_path)
    with locked(tmp_path):
        pass


def test_pruning_removes_what_a_kill_left_behind(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        state_path(tmp_path, step).mkdir(parents=True)
    (tmp_path / "checkpoints" / ".step-00000004.123-abc.tmp").mkdir()
    prune(tmp_path, keep=2)
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] != []
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["step-00000002", "step-00000003"]


def test_signal_handlers_are_put_back(tiny_data: Path, tmp_path: Path) -> None:
    before = [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGUSR1)]
    run(tiny_data, tmp_path, max_steps=1)
    assert [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGUSR1)] == before


@pytest.mark.parametrize("field", ["every_n_steps", "every_n_minutes", "keep"])
def test_impossible_intervals_are_refused(field: str) -> None:
    with pytest.raises(ConfigError, match=field):
        TrainingState(**{field: 0})
