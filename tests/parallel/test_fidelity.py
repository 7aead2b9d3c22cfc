"""Every layout trains every method as one process does: logits, losses, gradients, trained weights, artifacts."""

from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from graftwork.compat import parallel
from graftwork.errors import ArtifactError
from tests.contracts.methods import STACKS, shake
from tests.helpers.distributed import run_ranks
from tests.helpers.tiny_hf import make_tiny
from tests.parallel.cells import Cell, Outcome, adapter_directory, layout_name, model_of, run_cells

TOLERANCE = 1e-5
"""Largest difference of a tensor, relative to its largest value."""

LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "tp2": (2, {"tensor_model_parallel_size": 2}),
    "tp2_sp": (2, {"tensor_model_parallel_size": 2, "sequence_parallel": True}),
    "pp2": (2, {"pipeline_model_parallel_size": 2}),
    "pp2_vpp2": (2, {"pipeline_model_parallel_size": 2, "virtual_pipeline_model_parallel_size": 2}),
    "cp2": (2, {"context_parallel_size": 2}),
    "dp2": (2, {}),
    "ep2": (2, {"expert_model_parallel_size": 2}),
    "tp2_pp2": (4, {"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2}),
}
ALONE = ["full", "lora", "canonical", "ia3", "ptuning"]
EVERY = ["full", *STACKS]


def cells_of(layout: str) -> list[Cell]:
    """Return the cells that a layout runs."""
    if layout == "ep2":
        return [Cell("mixture", stack) for stack in EVERY]
    dense = [Cell("llama", stack) for stack in (ALONE if layout in ("pp2_vpp2", "tp2_pp2") else EVERY)]
    learned = [Cell("gpt2", stack) for stack in ("full", "ptuning", "all")]
    other = [Cell("qwen3", "ia3"), Cell("llama", "all", recompute="full")]
    packed = [] if layout == "cp2" else [Cell("llama", "all", packed=True)]
    return [*dense, *learned, *other, *packed]


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Checkpoints, and for every cell an artifact with values that nothing is zero in, written by one process."""
    root = tmp_path_factory.mktemp("fidelity")
    for base in ("llama", "gpt2", "qwen3"):
        make_tiny(base, root / base)
    for cell in {c for layout in LAYOUTS for c in cells_of(layout) if c.stack != "full"}:
        model = model_of(cell, root)
        model.configure_model()
        model.add_adapter(STACKS[cell.stack]())
        shake(model, 0.05)
        model.save_adapters(root / "born" / adapter_directory(cell))
    parallel.destroy()
    return root


@pytest.fixture(scope="module")
def one_process(workspace: Path) -> Any:
    """Return a function from cell to the outcome of one process."""

    @cache
    def outcome(cell: Cell) -> Outcome:
        return run_cells(0, 1, [cell], {}, workspace)[cell]

    yield outcome
    parallel.destroy()


def assert_close(found: Tensor, wanted: Tensor, what: Any) -> None:
    assert found.shape == wanted.shape, what
    difference, scale = (found - wanted).abs().max(), wanted.abs().max()
    assert difference <= TOLERANCE * scale, (what, float(difference / scale))


def assert_tensors(ranks: list[dict[str, Tensor]], wanted: dict[str, Tensor], what: str, exact: bool = False) -> None:
    """The ranks together know every tensor, and each of them the right one."""
    assert set().union(*ranks) == set(wanted), what
    for known in ranks:
        for name, tensor in known.items():
            if exact:
                assert torch.equal(tensor, wanted[name]), (what, name)
            else:
                assert_close(tensor, wanted[name], (what, name))


def assert_faithful(ranks: list[Outcome], wanted: Outcome) -> None:
    """Compare everything the ranks saw with one process."""
    for rank in ranks:
        assert rank.logits is not None and wanted.logits is not None
        assert_close(rank.logits, wanted.logits, "logits")
    assert_tensors([r.initial for r in ranks], wanted.initial, "initial values", exact=True)
    assert_tensors([r.gradients for r in ranks], wanted.gradients, "gradient")
    for rank in ranks:
        assert_close(torch.tensor(rank.losses), torch.tensor(wanted.losses), "losses")
    assert_tensors([r.weights for r in ranks], wanted.weights, "trained weight")


def assert_same_artifact(found: Path, wanted: Path) -> None:
    ours, theirs = load_file(found / "adapter_model.safetensors"), load_file(wanted / "adapter_model.safetensors")
    assert_tensors([ours], theirs, "saved tensor")


@pytest.mark.processes
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layout_equals_one_process(layout: str, workspace: Path, one_process: Any) -> None:
    world, sizes = LAYOUTS[layout]
    cells = cells_of(layout)
    ranks = run_ranks(run_cells, world, cells, sizes, workspace, timeout=300)
    for cell in cells:
        assert_faithful([rank[cell] for rank in ranks], one_process(cell))
        if cell.stack != "full":
            saved = workspace / layout_name(sizes, world) / adapter_directory(cell)
            assert_same_artifact(saved, workspace / layout_name({}, 1) / adapter_directory(cell))


def test_the_reference_trains(workspace: Path, one_process: Any) -> None:
    """Everything the matrix compares is alive: no gradient is zero, all trained tensors move."""
    for cell in cells_of("tp2"):
        wanted = one_process(cell)
        for name, gradient in wanted.gradients.items():
            assert gradient.abs().max() > 1e-7, (cell, name)
        assert all(not torch.equal(w, wanted.initial[n]) for n, w in wanted.weights.items()), cell


def test_recomputation_and_packing_are_other_cells(one_process: Any) -> None:
    """Recomputing changes nothing; packing is another batch."""
    plain, again = one_process(Cell("llama", "all")), one_process(Cell("llama", "all", recompute="full"))
    assert again.losses == pytest.approx(plain.losses, rel=1e-6)
    assert_tensors([again.gradients], plain.gradients, "gradient")
    assert one_process(Cell("llama", "all", packed=True)).losses != pytest.approx(plain.losses, rel=1e-3)


@pytest.mark.processes
@pytest.mark.parametrize(
    ("breakage", "layout", "cell", "noticed"),
    [
        ("drop_the_sequence_sum", "tp2_sp", Cell("llama", "all"), "gradient"),
        ("sum_what_is_whole", "tp2", Cell("llama", "lora"), "gradient"),
        ("sum_what_is_whole", "tp2_sp", Cell("gpt2", "ptuning"), "gradient"),
        ("mean_per_microbatch", "dp2", Cell("llama", "lora"), "gradient"),
    ],
)
def test_the_matrix_notices_a_mistake(
    breakage: str, layout: str, cell: Cell, noticed: str, workspace: Path, one_process: Any
) -> None:
    world, sizes = LAYOUTS[layout]
    ranks = run_ranks(run_cells, world, [cell], sizes, workspace, breakage)
    with pytest.raises(AssertionError, match=noticed):
        assert_faithful([rank[cell] for rank in ranks], one_process(cell))


@pytest.mark.processes
def test_the_matrix_notices_that_only_the_first_rank_is_saved(workspace: Path, one_process: Any) -> None:
    cell, (world, sizes) = Cell("llama", "ia3"), LAYOUTS["tp2"]
    one_process(cell)
    run_ranks(run_cells, world, [cell], sizes, workspace, "save_first_rank_only")
    saved = workspace / layout_name(sizes, world) / adapter_directory(cell)
    with pytest.raises(AssertionError, match="saved tensor"):
        assert_same_artifact(saved, workspace / layout_name({}, 1) / adapter_directory(cell))
    model = model_of(cell, workspace)
    model.configure_model()
    with pytest.raises(ArtifactError, match="has shape"):
        model.load_adapters(saved)
