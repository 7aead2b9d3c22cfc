"""How far a site has moved: what dense weights and kept copies say, in every layout."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from graftwork import parallel
from graftwork.layout import Layout
from graftwork.models import GPT
from graftwork.peft import METHODS, LoRA, Selective
from graftwork.peft.movement import Movement, movements
from tests.contracts.methods import IDS, STACKS, make, shake
from tests.helpers.distributed import run_ranks
from tests.parallel.layouts import Cell
from tests.parallel.models import model_of, write_checkpoints

OF_WEIGHT = ("LoRA", "CanonicalLoRA")
"""Methods whose whole effect is a low-rank update of weights."""


def tensors(model: GPT) -> dict[tuple[str, str], list[Tensor]]:
    """Return copies of the trained tensors by adapter and site."""
    found: dict[tuple[str, str], list[Tensor]] = {}
    for name in model.adapters:
        for tensor in model.stack.tensors(name):
            found.setdefault((name, tensor.site), []).append(tensor.value.detach().clone())
    return found


@pytest.mark.parametrize("stack", [IDS.get(m.short_name(), m.short_name()) for m in METHODS.values()])
def test_movement_is_that_of_kept_copies_and_of_dense_weights(stack: str) -> None:
    model = make("llama_tied")
    model.add_adapter(STACKS[stack]())
    assert {one.norm for one in movements(model.stack)} == {0.0}, "nothing has moved at birth"
    before = tensors(model)
    shake(model)
    after, found = tensors(model), {(one.adapter, one.site): one for one in movements(model.stack)}
    assert list(found) == list(before)
    for key, one in found.items():
        method = type(model.adapters[one.adapter]).__name__
        assert one.of_weight == (method in OF_WEIGHT)
        wanted, numbers = of_weight(model, one) if one.of_weight else of_values(before[key], after[key])
        assert one.norm == pytest.approx(wanted, rel=1e-5) and one.norm > 0
        assert one.rms == pytest.approx(wanted / numbers**0.5, rel=1e-5)


def of_values(before: list[Tensor], after: list[Tensor]) -> tuple[float, int]:
    squares = [(new.double() - old.double()).square().sum() for old, new in zip(before, after, strict=True)]
    return float(sum(squares)) ** 0.5, sum(one.numel() for one in before)


def of_weight(model: GPT, one: Movement) -> tuple[float, int]:
    """Merge the adapter into zeros of the weight's shape."""
    (item,) = [item for item in model.stack.grafted[one.adapter] if item.site.name == one.site]
    zeros = torch.zeros_like(item.site.module.get_parameter("weight"), dtype=torch.float64)
    change = item.adapter.merged_weights(zeros, None)[0].detach()
    return float(change.norm()), change.numel()


def test_initial_values_of_another_seed_would_be_noticed() -> None:
    """Deliberate break: values at birth follow from the seed, so a wrong one moves adapters that have not."""
    model = make("llama_tied")
    model.add_adapter(STACKS["canonical"]())
    model.stack._host = type(model.stack._host)(**{**vars(model.stack._host), "seed": 99})
    assert max(one.norm for one in movements(model.stack)) > 0.1


LAYOUTS = {
    "tp2": Layout(tensor_model_parallel_size=2),
    "pp2": Layout(pipeline_model_parallel_size=2),
    "ep2": Layout(expert_model_parallel_size=2),
}
SHARED = [LoRA("shared", dim=4, share_experts=True), LoRA("wide", dim=4, target_modules=["word_embeddings"])]


def in_layout(rank: int, world_size: int, root: Path, name: str) -> dict[str, list[Any]]:
    """Load the artifact of one process and return what has moved."""
    found = {}
    for base in bases(name):
        model = built(base, root, LAYOUTS.get(name, Layout()))
        if name == "one":
            model.add_adapter(chosen(base))
            shake(model, 0.05)
            model.save_adapters(root / base / "moved")
        else:
            model.load_adapters(root / base / "moved")
        found[base] = movements(model.stack)
    return found


def bases(name: str) -> list[str]:
    return ["mixture"] if name == "ep2" else ["llama", "mixture"] if name == "one" else ["llama"]


def chosen(base: str) -> list[Any]:
    return (
        SHARED
        if base == "mixture"
        else [*STACKS["lora's relatives"](), *STACKS["all"]()[1:], Selective(patterns=["norm"])]
    )


def built(base: str, root: Path, layout: Layout) -> GPT:
    model = model_of(Cell(base, "full"), root)
    parallel.initialize(layout)
    model.configure_model()
    return model


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = write_checkpoints(tmp_path_factory.mktemp("movement"))
    (root / "mixture").mkdir(exist_ok=True)
    return root


@pytest.fixture(scope="module")
def one(root: Path) -> dict[str, list[Any]]:
    return run_ranks(in_layout, 1, root, "one")[0]


@pytest.mark.processes
@pytest.mark.parametrize("name", LAYOUTS)
def test_layouts_tell_what_one_process_tells(name: str, one: dict[str, list[Any]], root: Path) -> None:
    for rank in run_ranks(in_layout, 2, root, name):
        for base, found in rank.items():
            wanted = {(m.adapter, m.site): m for m in one[base]}
            assert {(m.adapter, m.site) for m in found} == set(wanted) and len(found) == len(wanted)
            for moved in found:
                expected = wanted[moved.adapter, moved.site]
                assert moved.norm == pytest.approx(expected.norm, rel=1e-5) and moved.norm > 0, moved.site
                assert (moved.numbers, moved.of_weight) == (expected.numbers, expected.of_weight)
