"""Training states that were rewritten and signed again: the run that resumes is refused in one sentence, or goes on.

``trainer.pt`` goes to Lightning, callbacks, data and schedule, which each take any value: whole runs resume here.
"""

import json
import re
import shutil
import sys
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any
from zipfile import ZIP_DEFLATED, ZipFile

import pytest
import torch

from graftwork.cache import sha256
from graftwork.errors import GraftworkError
from graftwork.peft import LoRA
from graftwork.training.callbacks import BeforeAfter
from graftwork.training.run_directory import state_path
from graftwork.training.state import checkpoint
from tests.fuzz.mutations import Mutation, draw, mutate_json
from tests.helpers import tiny_run
from tests.helpers.tiny_run import finetune

STEPS = 2
LIMIT = 1000
DEEP = 20_000


def resumed(root: Path, data: Path, steps: int) -> None:
    """Run up to step ``steps``, from the state in ``root`` where there is one."""
    trainer = tiny_run.trainer(
        root, max_steps=steps, val_check_interval=1, limit_val_batches=1, enable_progress_bar=False,
        callbacks=[BeforeAfter(lambda *_: {"x": 1.0})],
    )  # fmt: skip
    model = tiny_run.model()
    finetune(model, trainer, tiny_run.data_module(data, global_batch_size=2), [LoRA(dim=2)], tiny_run.optim())


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Data, and the directory of a run of two steps."""
    data, root = tiny_run.write_data(tmp_path_factory.mktemp("data")), tmp_path_factory.mktemp("run")
    resumed(root, data, STEPS)
    return data, root


def sign(state: Path) -> None:
    """Make every checksum fit."""
    facts = json.loads((state / "state.json").read_text())
    facts["files"] = {name: sha256(state / name) for name in facts["files"]}
    (state / "state.json").write_text(json.dumps({**facts, "checksum": checkpoint._checksum(facts)}))


def rewrite(state: Path, file: str, change: Callable[[Any], Any]) -> None:
    """Change what a file of ``torch.save`` holds, and sign the state again."""
    found = change(torch.load(state / file, weights_only=True))
    limit = sys.getrecursionlimit()
    sys.setrecursionlimit(DEEP)  # pickle's own; its reader has none
    try:
        torch.save(found, state / file)
    finally:
        sys.setrecursionlimit(limit)
    sign(state)


def outcome(run: tuple[Path, Path], place: Path, change: Callable[[Path], None]) -> str:
    """Change a copy of the state and resume from it: 'refused' in one sentence, or 'gone on'."""
    data, root = run
    shutil.rmtree(place, ignore_errors=True)
    shutil.copytree(root, place)
    change(state_path(place, STEPS))
    try:
        resumed(place, data, STEPS + 1)
    except GraftworkError as refused:
        assert "\n" not in str(refused) and 10 < len(str(refused)) < LIMIT, str(refused)[:2000]
        return "refused"
    return "gone on"


def mutated(mutation: Mutation) -> Callable[[Any], Any]:
    """A change of the loops, callbacks and the rest, as JSON; what is no JSON afterwards stays as it was."""

    def change(found: Any) -> Any:
        try:
            return json.loads(mutate_json(json.dumps(found), mutation))
        except (ValueError, RecursionError):
            return found

    return change


def fuzz(count: int, run: tuple[Path, Path], place: Path) -> Counter[str]:
    counted: Counter[str] = Counter()
    for mutation in draw(count, ("json",)):
        try:
            counted[outcome(run, place, partial(rewrite, file="trainer.pt", change=mutated(mutation)))] += 1
        except Exception as error:
            raise AssertionError(f"{mutation}: {type(error).__name__}: {str(error)[:300]}") from error
    print(dict(counted))
    return counted


def test_signed_again_without_a_change_it_goes_on(run: tuple[Path, Path], tmp_path: Path) -> None:
    assert outcome(run, tmp_path / "copy", lambda state: rewrite(state, "trainer.pt", lambda found: found)) == "gone on"


def test_a_rewritten_trainer_file_is_one_sentence(run: tuple[Path, Path], tmp_path: Path) -> None:
    counted = fuzz(20, run, tmp_path / "copy")
    assert counted["refused"] and counted["gone on"]


@pytest.mark.slow
def test_hundreds_of_rewritten_trainer_files(run: tuple[Path, Path], tmp_path: Path) -> None:
    counted = fuzz(1000, run, tmp_path / "copy")
    assert counted["refused"] > 100 and counted["gone on"] > 100


def _set(found: dict[str, Any], path: str, value: object) -> dict[str, Any]:
    """Put ``value`` at a path of keys separated by slashes."""
    *above, last = path.split("/")
    inner: Any = found
    for key in above:
        inner = inner[key]
    inner[last] = value
    return found


def _nested(levels: int) -> object:
    value: object = 0
    for _ in range(levels):
        value = [value]
    return value


STEP = "loops/fit_loop/epoch_loop.automatic_optimization.optim_progress/optimizer/step/total/completed"
FINDINGS = {
    "loops that are none": ("loops", 3, "trainer.pt does not fit: 'loops'"),
    "a step that is text": (STEP, "2", "valid integer"),
    "another step than the state's": (STEP, 7, "trainer.pt is after step 7, the state of 2"),
    "a negative count": ("loops/fit_loop/epoch_loop.batch_progress/current/ready", -1, "greater than or equal to 0"),
    "a batch that nobody knows to be the last": ("loops/fit_loop/epoch_loop.batch_progress", {}, "Field required"),
    "states of loaders": ("loops/fit_loop/state_dict", {"combined_loader": "x"}, "valid list"),
    "another Lightning": ("pytorch-lightning_version", "0.0.1\n", "trainer.pt does not fit"),
    "a version that is none": ("pytorch-lightning_version", None, "trainer.pt does not fit"),
    "no schedule": ("lr_schedulers", {}, "valid list"),
    "a schedule that is text": ("lr_schedulers", [{"step": "x"}], "state of the learning rate's schedule"),
    "a position before the first row": ("SFTDataModule/consumed_samples", -1, "the position in the training data"),
    "a position that is lost": ("SFTDataModule", {}, "the position in the training data"),
    "a curve of text": ("callbacks/Report/train", "xy", "the loss curve of the training state"),
    "a best that is text": ("callbacks/AdapterCheckpoint[val_loss]/best", "x", "the state of the best adapter"),
    "a throughput that is a list": ("callbacks/Throughput/average", [], "the throughput of the training state"),
    "metrics that are none": ("callbacks/BeforeAfter/metrics", 1, "what was measured before"),
    "nested deep": ("loops/fit_loop/state_dict", {"combined_loader": _nested(3000)}, "deeper than 64 levels"),
    "a million characters": ("loops/" + "x" * 1_000_000, 1, ""),
}


@pytest.mark.parametrize("name", FINDINGS)
def test_past_findings_stay_one_sentence(name: str, run: tuple[Path, Path], tmp_path: Path) -> None:
    path, value, said = FINDINGS[name]
    data, root = run
    shutil.copytree(root, tmp_path / "copy")
    rewrite(state_path(tmp_path / "copy", STEPS), "trainer.pt", lambda found: _set(found, path, value))
    if not said:
        resumed(tmp_path / "copy", data, STEPS + 1)
        return
    with pytest.raises(GraftworkError, match=re.escape(said)) as refused:
        resumed(tmp_path / "copy", data, STEPS + 1)
    assert "\n" not in str(refused.value) and len(str(refused.value)) < LIMIT


RANDOM: dict[str, tuple[str, object]] = {
    "generators that are none": ("torch", 1),
    "too few bytes": ("torch", torch.zeros(3, dtype=torch.uint8)),
    "numbers of another kind": ("torch", torch.zeros(5056)),
    "zeros": ("torch", torch.zeros(5056, dtype=torch.uint8)),
    "Python's of another version": ("python", [9, [0] * 625, None]),
    "Python's cut short": ("python", [3, [1, 2], None]),
    "NumPy's of another kind": ("numpy", ["PCG64", torch.zeros(4, dtype=torch.int64), 0, 0, 0.0]),
    "NumPy's that are text": ("numpy", ["MT19937", "x", 0, 0, 0.0]),
    "megatron-core's of another kind": ("tracker", {"model-parallel-rng": torch.zeros(2)}),
    "megatron-core's that are a list": ("tracker", [1]),
}


@pytest.mark.parametrize("name", RANDOM)
def test_a_rewritten_random_state_is_one_sentence(name: str, run: tuple[Path, Path], tmp_path: Path) -> None:
    key, value = RANDOM[name]
    before = torch.get_rng_state()

    def change(state: Path) -> None:
        rewrite(state, "random-00000.pt", lambda found: {**found, key: value})

    assert outcome(run, tmp_path / "copy", change) == "refused"
    assert before.shape == torch.get_rng_state().shape


class Bomb:
    """Makes a file when Python's own unpickler reads it."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


@pytest.mark.parametrize("file", ["trainer.pt", "random-00000.pt", "tensors/common.pt"])
def test_nothing_of_a_foreign_file_runs_whatever_the_environment_says(
    file: str, run: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The variable makes torch's own default a reader that runs what it reads."""
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")

    def change(state: Path) -> None:
        torch.save({"x": Bomb(tmp_path / "ran")}, state / file)
        sign(state)

    assert outcome(run, tmp_path / "copy", change) == "refused"
    assert not (tmp_path / "ran").exists()


def test_a_compressed_file_is_refused_before_it_grows(run: tuple[Path, Path], tmp_path: Path) -> None:
    def change(state: Path) -> None:
        torch.save({"x": torch.zeros(2**24)}, state / "plain.pt")
        with ZipFile(state / "plain.pt") as plain, ZipFile(state / "trainer.pt", "w", ZIP_DEFLATED) as small:
            for entry in plain.infolist():
                small.writestr(entry.filename, plain.read(entry))
        (state / "plain.pt").unlink()
        sign(state)
        assert (state / "trainer.pt").stat().st_size < 2**20

    assert outcome(run, tmp_path / "copy", change) == "refused"
