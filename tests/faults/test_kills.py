"""A kill at every call that changes the disk: what is visible is whole, and the next run ends with the same bits."""

import hashlib
import os
import re
import resource
import signal
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from graftwork.atomic import clear_leftovers
from graftwork.models.weights import fingerprint
from graftwork.models.weights.hub import resolve
from graftwork.peft import LoRA
from graftwork.peft.artifact.directory import opened
from graftwork.training.callbacks import TrainingState
from graftwork.training.run_directory import latest, state_path, states
from graftwork.training.state import checkpoint
from tests.helpers import tiny_run
from tests.helpers.moments import die_at, live, name_of, watched
from tests.helpers.tiny_gguf import write_gguf
from tests.helpers.tiny_hf import make_tiny
from tests.helpers.tiny_run import finetune

TP2 = {"tensor_model_parallel_size": 2}


def train(root: Path, world_size: int, peft: list[LoRA], layout: dict[str, Any]) -> None:
    """Four steps with a validation and a state every second one; its rows are tokenised below ``root`` too."""
    trainer = tiny_run.trainer(
        root / "run",
        world_size,
        layout,
        max_steps=4,
        val_check_interval=2,
        enable_progress_bar=False,
        callbacks=[TrainingState(every_n_steps=2)],
    )
    data = tiny_run.data_module(root.parent / "data")
    data.cache_dir = str(root / "cache")
    finetune(tiny_run.model(), trainer, data, peft, tiny_run.optim(schedule="constant"))


def adapter(root: Path, world_size: int) -> None:
    """States, artifacts, token cache, summary and picture."""
    train(root, world_size, [LoRA(dim=4)], TP2 if world_size > 1 else {})


def full(root: Path, world_size: int) -> None:
    """Full fine-tuning: larger states and the exported model."""
    train(root, world_size, [], TP2 if world_size > 1 else {})


def merged(root: Path, world_size: int) -> None:
    """An adapter is merged and the model written over the one that stands there."""
    model = tiny_run.model()
    model.configure_model()
    if not (root / "model").exists():
        model.export_hf(root / "model")
    model.add_adapter(LoRA(dim=4, name="merged"))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.fill_(0.1)
    model.merge_adapters()
    model.export_hf(root / "model")


def conversion(root: Path, world_size: int) -> None:
    """A GGUF file becomes a directory of the cache, whose fingerprint is noted there."""
    os.environ["GRAFTWORK_CACHE"] = str(root / "cache")
    directory = resolve(str(root.parent / "tiny.gguf"))
    time.sleep(0.1)  # of files that were written this instant no fingerprint is noted
    fingerprint(directory)


class Life(NamedTuple):
    """A program that writes below a directory, and the ranks it runs on."""

    program: Callable[[Path, int], None]
    ranks: int = 1


LIVES = {
    "adapter": Life(adapter),
    "full": Life(full),
    "merge": Life(merged),
    "conversion": Life(conversion),
    "adapter_tp2": Life(adapter, 2),
    "full_tp2": Life(full, 2),
}


def contents(root: Path) -> dict[str, str]:
    """Return the SHA-256 of every file that must not depend on kills, by path; whoever wrote it."""
    found = {}
    for path in sorted(root.rglob("*")):
        name = str(path.relative_to(root))
        hidden = any(part.startswith(".") for part in path.relative_to(root).parts)
        if path.is_file() and not hidden and path.suffix in (".safetensors", ".arrow", ".json") and "logs/" not in name:
            own = path.name in ("summary.json", "state.json") or name.endswith(".seal.json")  # these hold times
            found[name] = hashlib.sha256(b"" if own else path.read_bytes()).hexdigest()
    return found


def visible(root: Path, wanted: dict[str, str]) -> None:
    """Assert that whatever can be seen below ``root`` is whole."""
    run = root / "run"
    for state in states(run):
        checkpoint.read_common(state)  # compares every file with its checksum
    for place in (run / "adapter", run / "adapter-last"):
        if place.exists():
            with opened(place) as found:
                assert found.config.step in (2, 4)
    for place in (run / "model", *(root / "cache").glob("models/*-*"), *(root / "cache").glob("tokens/*")):
        if place.is_dir() and not place.name.startswith("."):
            names = {n: v for n, v in wanted.items() if (root / n).is_relative_to(place)}
            assert names and {n: v for n, v in contents(root).items() if n in names} == names
    if (run / "loss.png").exists():
        assert (run / "loss.png").read_bytes().endswith(b"IEND\xaeB`\x82")


def lived(rank: int, world_size: int, root: Path, kind: str, named: str | None, before: int, victim: int) -> list[str]:
    """Run a program, up to the call of rank ``victim`` that ``die_at`` means; return this rank's calls."""
    with watched(root, die_at(named if rank == victim else None, before)) as calls:
        LIVES[kind].program(root, world_size)
    return calls


def again(rank: int, world_size: int, root: Path, kind: str, wanted: dict[str, str]) -> dict[str, str]:
    """Look at what is visible, run the program once more and return what stands there then."""
    visible(root, wanted)
    LIVES[kind].program(root, world_size)
    return contents(root) if rank == 0 else {}


class Whole(NamedTuple):
    """A life without a kill: each rank's calls and what stood there at the end."""

    calls: list[list[str]]
    contents: dict[str, str]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with data and a base to convert; every life has a directory beside them."""
    root = tmp_path_factory.mktemp("kills")
    (root / "data").mkdir()
    tiny_run.write_data(root / "data")
    write_gguf(root / "tiny.gguf", make_tiny("llama", root / "hf"))
    return root


_WHOLE: dict[tuple[Path, str], Whole] = {}


def whole(place: Path, kind: str) -> Whole:
    """Return a life without a kill, lived once per kind."""
    if (place, kind) not in _WHOLE:
        _WHOLE[place, kind] = _whole(place, kind)
    return _WHOLE[place, kind]


def _whole(place: Path, kind: str) -> Whole:
    root = place / f"{kind}-whole"
    root.mkdir()
    calls = live(lived, LIVES[kind].ranks, root, kind, None, 0, 0)
    assert all(isinstance(found, list) for found in calls), calls
    return Whole(calls, contents(root))


def killed_and_resumed(place: Path, kind: str, victim: int, moment: int, life: Whole) -> bool:
    """Kill at one moment, then live again: everything must be as if nothing had happened.

    Of two ranks that race for a call only one makes it: whether the victim came to it is returned.
    """
    root = Path(tempfile.mkdtemp(prefix=f"{kind}-{victim}-{moment}-", dir=place))
    names, ranks = [name_of(call) for call in life.calls[victim]], LIVES[kind].ranks
    # How often ranks ask while they wait for each other differs from life to life: there the first of a name counts.
    before = names[:moment].count(names[moment]) if ranks == 1 else 0
    first = live(lived, ranks, root, kind, names[moment], before, victim)
    came = first[victim] == -signal.SIGKILL
    assert came or (ranks > 1 and isinstance(first[victim], list)), first
    found = live(again, LIVES[kind].ranks, root, kind, life.contents)
    told = f"{kind}, rank {victim}, killed before {life.calls[victim][moment]}"
    assert found[0] == life.contents, (told, found)
    if kind != "merge":  # a directory of the user's own, where nobody holds a lock, keeps a hidden leftover
        left = sorted(str(p) for p in root.rglob("*.tmp"))
        assert not left, (told, left)
    return came


def distinct(calls: list[str], most: int) -> list[int]:
    """Return the numbers of at most ``most`` calls, spread over those that differ by more than step and process."""
    named: dict[str, int] = {}
    for number, call in enumerate(calls):
        named[re.sub(r"\d+-[0-9a-f]{8}|step-\d+|[0-9a-f]{16,}", "*", call)] = number  # the last of its kind
    numbers = sorted(named.values())
    return numbers if len(numbers) <= most else [numbers[i * len(numbers) // most] for i in range(most)]


FEW = {
    "adapter": (0, r"os.rename .*\.step-00000004"),
    "merge": (0, r"os.rmdir "),
    "conversion": (0, r"os.rename .*seal.json"),
    "full_tp2": (1, r"os.fsync .*step-00000004.*__1_0"),
}
"""A rank and a call of each kind of save: before a state is seen, after two models have changed places, and so on."""


@pytest.mark.fault(
    "a kill inside a save leaves a state, an adapter, a model or a cache entry that is half of one and half of another",
    "each appears whole or not at all; killed at any call that changes the disk, the next run ends with the same bits",
)
@pytest.mark.processes
@pytest.mark.parametrize("kind", [pytest.param(k, marks=pytest.mark.slow) if k == "full_tp2" else k for k in FEW])
def test_killed_inside_a_save(kind: str, place: Path) -> None:
    life, (victim, wanted) = whole(place, kind), FEW[kind]
    moment = next(n for n, call in enumerate(life.calls[victim]) if re.match(wanted, call))
    assert killed_and_resumed(place, kind, victim, moment, life)


@pytest.mark.slow
@pytest.mark.processes
@pytest.mark.parametrize("kind", LIVES)
def test_killed_at_many_moments(kind: str, place: Path) -> None:
    """Twenty-four calls of every rank, or all there are."""
    life, came = whole(place, kind), list[bool]()
    for victim, calls in enumerate(life.calls):
        for moment in distinct(calls, 24 // len(life.calls)):
            came.append(killed_and_resumed(place, kind, victim, moment, life))
    assert sum(came) > 2 * len(came) / 3, came
    print(f"{kind}: killed at {sum(came)} of {sum(map(len, life.calls))} calls, lost 0")


@pytest.mark.processes
@pytest.mark.parametrize(
    ("kind", "size"),
    [
        ("conversion", 20_000),
        *(pytest.param(kind, size, marks=pytest.mark.slow) for kind in LIVES for size in (1_000, 40_000)),
    ],
)
def test_killed_in_the_middle_of_a_write(kind: str, size: int, place: Path) -> None:
    """The kernel ends the process at byte ``size`` of the first file that grows so long, whoever writes it."""
    life, root = whole(place, kind), place / f"{kind}-byte-{size}"
    root.mkdir()
    first = live(cut_off, LIVES[kind].ranks, root, kind, size)
    assert -signal.SIGXFSZ in first, first
    found = live(again, LIVES[kind].ranks, root, kind, life.contents)
    assert found[0] == life.contents, (kind, size)


def cut_off(rank: int, world_size: int, root: Path, kind: str, size: int) -> None:
    """Run a program whose files must not grow beyond ``size`` bytes."""
    signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
    LIVES[kind].program(root, world_size)


@pytest.mark.fault(
    "a killed run leaves a forked writer that goes on writing into its directory",
    "a state is written by the run's own process",
)
def test_a_save_starts_no_process(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused() -> None:
        raise AssertionError("a save starts a process")

    monkeypatch.setattr(os, "fork", refused)
    (place / "alone").mkdir()
    adapter(place / "alone", 1)
    assert [path.name for path in states(place / "alone" / "run")] == ["step-00000002", "step-00000004"]


def test_what_killed_processes_left_is_cleared_and_nothing_else(tmp_path: Path) -> None:
    for name in (".model.12-0123abcd.tmp", ".adapter.9-0123abcd.tmp", ".other.tmp", "model", ".model.12-0123abcd"):
        (tmp_path / name).mkdir()
    (tmp_path / ".summary.json.1-00000000.tmp").write_text("half")
    clear_leftovers(tmp_path, "model")
    assert not (tmp_path / ".model.12-0123abcd.tmp").exists() and (tmp_path / ".adapter.9-0123abcd.tmp").exists()
    clear_leftovers(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".model.12-0123abcd", ".other.tmp", "model"]


@pytest.mark.slow
@pytest.mark.fault(
    "the newest training state is chosen by a file's time, which another machine's clock has set",
    "states are ordered by the step in their name; locks end with their holder, not by age",
)
def test_clocks_apart(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The files' times say the opposite of the steps, a year ahead and long ago; a dead holder's lock is from there."""
    root = place / "clocks"
    (root / "run").mkdir(parents=True)
    (root / "run" / ".lock").write_text("process 1 on another machine\n")
    os.utime(root / "run" / ".lock", (4e9, 4e9))
    adapter(root, 1)
    for age, state in zip((4e9, 0), states(root / "run"), strict=True):
        for path in (state, *state.rglob("*")):
            os.utime(path, (age, age))
    assert latest(root / "run") == state_path(root / "run", 4)
    before = contents(root)
    monkeypatch.setattr(time, "time", lambda: 0.0)
    adapter(root, 1)
    assert contents(root) == before
