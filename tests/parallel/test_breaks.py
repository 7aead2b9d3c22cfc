"""The matrix fails when the code is wrong: one deliberate mistake at a time."""

from collections.abc import Callable
from pathlib import Path

import pytest

from graftwork import parallel
from graftwork.errors import ArtifactError
from tests.helpers.distributed import run_ranks
from tests.helpers.layouts import layout_of
from tests.parallel.breaks import BREAKS
from tests.parallel.cells import Outcome, run_cells
from tests.parallel.compare import TOLERANCE, assert_faithful, differences
from tests.parallel.layouts import LAYOUTS, Cell
from tests.parallel.models import model_of

MISTAKES = [
    ("drop_the_sequence_sum", "tp2_sp", Cell("llama", "lora"), "gradients"),
    ("drop_the_sequence_sum", "tp2_sp", Cell("llama", "canonical"), "gradients"),
    ("drop_the_sequence_sum", "tp2_sp", Cell("llama", "ptuning"), "gradients"),
    ("drop_the_sequence_sum", "tp2_sp", Cell("gpt2", "lent+tied"), "gradients"),
    ("drop_the_sequence_sum", "tp2", Cell("qwen3", "full"), "gradients"),
    ("sum_what_is_whole", "tp2", Cell("llama", "lora"), "gradients"),
    ("sum_what_is_whole", "tp2_sp", Cell("gpt2", "ptuning"), "gradients"),
    ("mean_per_microbatch", "dp2", Cell("llama", "lora"), "losses"),
    ("mean_per_replica", "dp2", Cell("llama", "lora"), "losses"),
    ("average_over_replicas", "dp2", Cell("llama", "ia3"), "gradients"),
    ("forget_tied_copy", "pp2", Cell("gpt2", "full"), "gradients"),
    ("forget_tied_copy", "pp2", Cell("gpt2", "lent+parallel"), "gradients"),
    ("norm_of_own_columns", "tp2", Cell("llama", "dora"), "logits"),
    ("drop_the_sequence_sum", "tp2_sp", Cell("llama", "lora's relatives"), "gradients"),
    ("copies_per_expert_rank", "ep2", Cell("mixture", "shared experts"), "gradients"),
    ("task_slot_off_by_one", "tp2", Cell("llama", "tasks"), "logits"),
    ("forget_the_route", "pp2", Cell("llama", "everything", recompute="full", routed=True), "gradients"),
    ("table_of_own_heads", "tp2", Cell("t5", "full"), "gradients"),
    ("biases_of_the_first_heads", "tp2_sp", Cell("mt5", "everything"), "logits"),
    ("drop_the_sequence_sum", "tp2_sp", Cell("mt5", "everything"), "gradients"),
    ("neighbouring_chunks", "cp2", Cell("llama", "lora", packed=True), "losses"),
    ("positions_of_the_row", "cp2", Cell("gpt2", "full", packed=True), "losses"),
    ("padding_is_learned", "cp2", Cell("llama", "lora", packed=True), "losses"),
]
BY_PROCESSES = sorted({(breakage, layout) for breakage, layout, _, _ in MISTAKES})


@pytest.mark.processes
@pytest.mark.parametrize(("breakage", "layout"), BY_PROCESSES)
def test_the_matrix_notices_a_mistake(
    breakage: str, layout: str, checkpoints: Path, one_process: Callable[[Cell], Outcome]
) -> None:
    wanted = {cell: figure for name, where, cell, figure in MISTAKES if (name, where) == (breakage, layout)}
    ranks = run_ranks(run_cells, 2, list(wanted), LAYOUTS[layout].sizes, checkpoints, breakage)
    for i, (cell, figure) in enumerate(wanted.items()):
        found = differences([rank[i] for rank in ranks], one_process(cell))
        assert found[figure] > 100 * TOLERANCE, (cell, found)
        with pytest.raises(AssertionError, match=f"'{figure}'"):
            assert_faithful(found)


def save_with(rank: int, world: int, breakage: str, root: Path, path: Path) -> None:
    """Save a fresh adapter over two tensor-parallel ranks, once its proof has been refused on both."""
    parallel.initialize(layout_of(tensor=2))
    BREAKS[breakage]()
    model = model_of(Cell("llama", "lora"), root)
    model.configure_model()
    with pytest.raises(ArtifactError, match="has shape"):
        model.save_adapters(path)
    assert not path.exists()
    model.save_adapters(path, verify=False)


@pytest.mark.processes
def test_an_artifact_of_the_first_rank_only_is_noticed(checkpoints: Path, tmp_path: Path) -> None:
    run_ranks(save_with, 2, "save_first_rank_only", checkpoints, tmp_path / "half")
    model = model_of(Cell("llama", "base"), checkpoints)
    model.configure_model()
    with pytest.raises(ArtifactError, match=r"has shape \[\d+, \d+\], but the model needs"):
        model.load_adapters(tmp_path / "half")
    parallel.destroy()


def test_the_comparison_needs_every_tensor(one_process: Callable[[Cell], Outcome]) -> None:
    """A rank that forgets a tensor, or that was born with other values, is no match."""
    whole = one_process(Cell("llama", "ia3"))
    name = next(iter(whole.gradients))
    part = {key: tensor for key, tensor in whole.gradients.items() if key != name}
    with pytest.raises(AssertionError, match=name):
        differences([Outcome(**{**vars(whole), "gradients": part})], whole)
    other = {key: tensor + (1e-7 if key == name else 0.0) for key, tensor in whole.initial.items()}
    with pytest.raises(AssertionError, match="initial values differ"):
        differences([Outcome(**{**vars(whole), "initial": other})], whole)
    assert_faithful(differences([whole, whole], whole))
