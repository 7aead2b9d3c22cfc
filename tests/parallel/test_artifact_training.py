"""An adapter saved in any layout goes on in any other as in one process; ranks read their slices and fail together."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from graftwork import parallel
from graftwork.errors import ArtifactError
from graftwork.models import GPT
from graftwork.optim import AdamW
from graftwork.parallel.collective import barrier
from graftwork.peft.artifact import verified
from graftwork.peft.artifact.verified import StoredTensor
from tests.helpers.distributed import run_ranks
from tests.helpers.layouts import layout_of
from tests.helpers.standin import trainer_for
from tests.parallel.cells import LEARNING, Probe
from tests.parallel.compare import TOLERANCE, elementwise, tensorwise
from tests.parallel.layouts import LAYOUTS, Cell
from tests.parallel.models import model_of, write_checkpoints
from tests.parallel.rows import Rows
from tests.parallel.whole import whole

TENSORS = "adapter_model.safetensors"
WHERE = {"llama": ("one", "tp2", "pp2", "tp2_pp2"), "mixture": ("one", "ep2", "tp2_sp_ep2")}
PAIRS = [(base, here, there) for base, places in WHERE.items() for here in places for there in places]
Places = list[tuple[str, str]]
Continued = dict[tuple[str, str, str], tuple[Tensor, float, bool]]


def of_world(world: int) -> Places:
    """Return the (base, layout) of so many ranks."""
    return [(b, n) for b, places in WHERE.items() for n in places if (LAYOUTS[n].world if n != "one" else 1) == world]


def save(rank: int, world: int, places: Places, root: Path) -> None:
    """Train all four methods one step in each layout and save them there."""
    for base, name in places:
        model = model_of(Cell(base, "all"), root)
        one_step(model, rank, world, name)
        model.save_adapters(root / "saved" / f"{base}-{name}")


def go_on(rank: int, world: int, places: Places, root: Path) -> Continued:
    """In each layout load what every layout saved: logits, the next step's loss, whether every bit is the file's."""
    found = {}
    for base, name in places:
        for there in WHERE[base]:
            model, path = model_of(Cell(base, "base"), root), root / "saved" / f"{base}-{there}"
            model.load_adapters(path)
            seen = one_step(model, rank, world, name)
            file = load_file(path / TENSORS)
            same = all(torch.equal(tensor, file[key_in_file(n)]) for n, tensor in seen.initial.items())
            assert seen.logits is not None
            found[base, name, there] = (seen.logits, seen.losses[0], same)
    return found


def one_step(model: GPT, rank: int, world: int, name: str) -> Any:
    """Train one step without moving the initial values; return what a Probe saw."""
    probe = Probe(shaken=False)
    model.prepare(AdamW(**LEARNING))
    sizes = {} if name == "one" else LAYOUTS[name].sizes
    trainer_for(sizes, world, rank, callbacks=[probe], max_steps=1, limit_val_batches=0).fit(model, datamodule=Rows())
    return probe.outcome


def key_in_file(name: str) -> str:
    """``<site>.adapters.<adapter>.<tensor>`` is ``<adapter>.<site>.<tensor>`` in an artifact."""
    site, _, rest = name.partition(".adapters.")
    adapter, _, tensor = rest.partition(".")
    return f"{adapter}.{site}.{tensor}"


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = write_checkpoints(tmp_path_factory.mktemp("artifacts"))
    save(0, 1, of_world(1), root)
    parallel.destroy()
    for world in (2, 4):
        run_ranks(save, world, of_world(world), root, timeout=300)
    return root


@pytest.fixture(scope="module")
def continued(root: Path) -> dict[int, list[Continued]]:
    alone = go_on(0, 1, of_world(1), root)
    parallel.destroy()
    return {1: [alone], **{world: run_ranks(go_on, world, of_world(world), root, timeout=300) for world in (2, 4)}}


@pytest.mark.processes
@pytest.mark.parametrize(("base", "here", "there"), PAIRS)
def test_saved_there_goes_on_here(base: str, here: str, there: str, continued: dict[int, list[Continued]]) -> None:
    logits, loss, _ = continued[1][0][base, "one", there]
    for rank in continued[LAYOUTS[here].world if here != "one" else 1]:
        found, next_loss, same = rank[base, here, there]
        assert same, "a loaded tensor is not the file's, bit for bit"
        assert tensorwise(found, logits) <= TOLERANCE
        assert elementwise(torch.tensor(next_loss), torch.tensor(loss)) <= TOLERANCE


class CountedTensor(StoredTensor):
    """A tensor of a file that counts the elements it hands out."""

    read = 0

    def __getitem__(self, index: Any) -> Tensor:
        found = super().__getitem__(index)
        CountedTensor.read += found.numel()
        return found


def read_slices(rank: int, world: int, layouts: list[str], root: Path) -> list[tuple[int, int, int]]:
    """Return, per layout, elements read from the file, elements of this rank's adapters, elements of the whole file."""
    verified.StoredTensor, found = CountedTensor, []  # type: ignore[misc]
    for name in layouts:
        model, path = model_of(Cell("llama", "base"), root), root / "saved" / "llama-one"
        CountedTensor.read = 0
        model.load_adapters(path)
        one_step(model, rank, world, name)
        held = sum(p.numel() for n, p in model.named_parameters() if ".adapters." in n)
        whole_file = sum(t.numel() for n, t in load_file(path / TENSORS).items() if not n.endswith(".table"))
        found.append((CountedTensor.read, held, whole_file))
    return found


@pytest.mark.processes
def test_each_rank_reads_its_slices_only(root: Path) -> None:
    ranks = run_ranks(read_slices, 2, ["tp2", "pp2"], root)
    for per_layout in ranks:
        for read, held, everything in per_layout:
            assert read == held < everything
    (_, first, everything), (_, second, _) = (rank[1] for rank in ranks)
    assert first + second == everything, "two stages share no adapter"


def refuse(rank: int, world: int, root: Path) -> list[str]:
    """Meet artifacts that only the second rank cannot read, before and after the model is built."""
    good, found = root / "saved" / "llama-one", []
    for built in (False, True):
        for name in ("missing", "damaged", "another"):
            model = model_of(Cell("llama", "base"), root)
            if built:
                parallel.initialize(layout_of(tensor=2))
                model.configure_model()
            before = list(dict(model.named_parameters()))
            try:
                model.load_adapters(root / name if rank == 1 else good)
            except ArtifactError as error:
                found.append(str(error))
            assert before == list(dict(model.named_parameters())) and not model.adapters
            barrier()
    return found


@pytest.mark.processes
def test_one_rank_that_cannot_read_stops_all_and_none_hangs(root: Path) -> None:
    for name in ("damaged", "another"):
        shutil.copytree(root / "saved" / ("llama-one" if name == "damaged" else "llama-tp2"), root / name)
    damaged = root / "damaged" / TENSORS
    damaged.write_bytes(damaged.read_bytes()[:-1])
    first, second = run_ranks(refuse, 2, root)
    assert len(first) == 6 and first[0] == second[0] and first[1] == second[1]
    assert first[3:5] == first[:2] == second[3:5]
    assert "There is no adapter directory" in first[0] and "checksum does not match" in first[1]
    for rank in (first, second):
        assert "not the same adapter on every machine" in rank[2] and "not the same adapter" in rank[5]


def test_a_changed_tensor_is_noticed(root: Path) -> None:
    """The comparison of what goes on is no comparison of constants."""
    model = model_of(Cell("llama", "base"), root)
    model.load_adapters(root / "saved" / "llama-one")
    model.configure_model()
    before = whole(model)
    with torch.no_grad():
        next(model.stack.adapters("lora")).lora_B.mul_(1.01)  # type: ignore[operator]
    changed = [n for n, tensor in whole(model).items() if not torch.equal(tensor, before[n])]
    assert len(changed) == 1 and changed[0].endswith("lora_B")
    parallel.destroy()
