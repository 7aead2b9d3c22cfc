"""Resume of every method over ranks: bit for bit at the same layout, within rounding at another one."""

import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, Trainer

from graftwork import parallel
from graftwork.batch import Batch
from graftwork.parallel.collective import barrier
from graftwork.parallel.names import global_name
from graftwork.peft import IA3, CanonicalAdapter, LoRA, PTuning
from graftwork.training.callbacks import Interrupted, Report
from graftwork.training.optimizer.shards import chunks_of
from tests.helpers import tiny_run
from tests.helpers.distributed import run_ranks
from tests.helpers.tiny_run import finetune

STEPS, STOP = 4, 2
METHODS: dict[str, Any] = {
    "stack": lambda: [
        PTuning(virtual_tokens=3, embedding_dim=8, bottleneck_dim=8),
        CanonicalAdapter(dim=4),
        LoRA(dim=4),
        IA3(),
    ],
    "full": list,
    "lora": lambda: [LoRA(dim=4)],
    "canonical": lambda: [CanonicalAdapter(dim=4)],
    "ia3": lambda: [IA3()],
    "ptuning": lambda: [PTuning(virtual_tokens=3, embedding_dim=8, bottleneck_dim=8)],
}
FAST = ("stack", "full")
"""The stack holds each tensor of each method; the methods one by one are trained in `make test-all`."""
BATCHES: dict[str, dict[str, Any]] = {
    "padded": {},
    "packed": {"packing": True, "seq_length": 64, "micro_batch_size": 1, "global_batch_size": 2},
}
LAYOUTS: dict[str, dict[str, Any]] = {
    "one": {},
    "tp2_sp": {"tensor_model_parallel_size": 2, "sequence_parallel": True},
    "pp2": {"pipeline_model_parallel_size": 2},
    "dp2": {},
}
FEW: dict[str, dict[str, Any]] = {
    "vpp2": {"pipeline_model_parallel_size": 2, "virtual_pipeline_model_parallel_size": 2},
    "cp2": {"context_parallel_size": 2},
}
"""Layouts that train only some of the cases."""
DEEP = replace(tiny_run.SHAPE, num_layers=4)
CASES = [(method, batch) for method in METHODS for batch in BATCHES]
Cases = list[tuple[str, str]]
FEW_CASES = [("full", "padded", "vpp2"), ("full", "packed", "cp2")]
MOVES = [
    *(("tp2_sp", "one", "padded"), ("pp2", "one", "padded"), ("vpp2", "one", "padded"), ("one", "tp2_sp", "padded")),
    *(
        ("tp2_sp", "pp2", "padded"),
        ("pp2", "dp2", "padded"),
        ("dp2", "one", "padded"),
        ("one", "cp2", "packed"),
        ("cp2", "one", "packed"),
    ),
]
"""Full fine-tuning, cut in one layout and resumed in another."""


class Rows(Callback):
    """Remembers which rows each step has seen."""

    def __init__(self) -> None:
        self.seen: list[Any] = []

    def on_train_batch_start(self, trainer: Trainer, pl_module: Any, batch: Batch, batch_idx: int) -> None:
        """Note the batch's rows."""
        self.seen.append(batch.rows.tolist())


def train(rank: int, data: Path, root: Path, layout: str, method: str, batch: str, stop: int | None = None) -> dict:
    """Train all steps, or up to a request to stop on the last rank only; return what this rank has seen and become."""
    world_size = torch.distributed.get_world_size() if layout != "one" else 1
    os.environ["LOCAL_RANK"] = str(rank)
    sizes = {**LAYOUTS, **FEW}[layout]
    rows = Rows()
    asked = [tiny_run.StopAfter(stop)] if stop and rank == world_size - 1 else []
    options = {"max_steps": STEPS, "limit_val_batches": 0, "enable_progress_bar": False}
    trainer = tiny_run.trainer(root, world_size, sizes, callbacks=[rows, *asked], **options)
    deep = "vpp2" in root.parts
    model = tiny_run.GPT(DEEP if deep else tiny_run.SHAPE, checkpoint=str(data / ("deep" if deep else "base")))
    optim = tiny_run.optim(eps=1e-4)  # a small eps turns rounding into +-lr
    try:
        finetune(model, trainer, tiny_run.data_module(data, **BATCHES[batch]), METHODS[method](), optim)
        assert stop is None
    except Interrupted as stopped:
        assert stop is not None and stopped.code == 75
    report = next(c for c in trainer.callbacks if isinstance(c, Report))
    weights = {
        global_name(chunk, n): p.detach().clone()
        for chunk in chunks_of(model)
        for n, p in chunk.named_parameters()
        if p.requires_grad
    }
    return {"losses": [loss for _, loss in report.train], "weights": weights, "rows": rows.seen}


def every_case(rank: int, data: Path, root: Path, layout: str, cases: Cases) -> dict[Any, Any]:
    """For every case: whole, and cut and resumed; the cut state is kept for another layout."""
    found = {}
    for method, batch in cases:
        at = root / layout / method / batch
        whole = train(rank, data, at / "whole", layout, method, batch)
        cut = train(rank, data, at / "cut", layout, method, batch, stop=STOP)
        if method == "full":
            _copy(rank, at / "cut", at / "moved")
        same = train(rank, data, at / "cut", layout, method, batch)
        found[method, batch, layout] = {"whole": whole, "cut": cut, "same": same}
    return found


def two_ranks(rank: int, world_size: int, data: Path, root: Path, cases: Cases) -> dict[Any, Any]:
    """Every case in every layout of two ranks, then what moves to two ranks."""
    found: dict[Any, Any] = {}
    for layout in ("tp2_sp", "pp2", "dp2"):
        found |= every_case(rank, data, root, layout, cases)
    for method, batch, layout in FEW_CASES:
        found |= every_case(rank, data, root, layout, [(method, batch)])
    for source, target, batch in MOVES:
        if target != "one":
            at = root / source / "full" / batch
            _copy(rank, at / "moved", at / target)
            found[source, target] = train(rank, data, at / target, target, "full", batch)
    return found


def _copy(rank: int, source: Path, target: Path) -> None:
    if rank == 0:
        shutil.copytree(source, target)
    barrier()


@pytest.fixture(scope="module")
def results(
    request: pytest.FixtureRequest, tiny_data: Path, tmp_path_factory: pytest.TempPathFactory
) -> list[dict[Any, Any]]:
    """What every rank found in the cases that are asked for, the single process first."""
    root = tmp_path_factory.mktemp("layouts")
    asked = [item.callspec.params for item in request.session.items if item.path == request.path]
    methods = {params["method"] for params in asked if "method" in params} | {"full"}
    cases = [case for case in CASES if case[0] in methods]
    for name, shape in (("base", tiny_run.SHAPE), ("deep", DEEP)):
        base = tiny_run.GPT(shape)
        base.configure_model()
        base.export_hf(tiny_data / name)
    parallel.destroy()
    one = every_case(0, tiny_data, root, "one", cases)
    ranks = run_ranks(two_ranks, 2, tiny_data, root, cases, timeout=400)
    for source, target, batch in MOVES:
        if target == "one":
            at = root / source / "full" / batch / "moved"
            one[source, target] = train(0, tiny_data, at, target, "full", batch)
    return [one, *ranks]


@pytest.mark.fault(
    "P-tuning cannot be resumed: only its output is saved",
    "the encoder's own tensors are saved; a resumed run equals an uninterrupted one",
)
@pytest.mark.processes
@pytest.mark.parametrize(
    ("method", "batch", "layout"),
    [
        *(
            pytest.param(*case, layout, marks=() if case[0] in FAST else pytest.mark.slow)
            for case in CASES
            for layout in LAYOUTS
        ),
        *FEW_CASES,
    ],
)
def test_interrupted_and_resumed_equals_uninterrupted(method: str, batch: str, layout: str, results: list) -> None:
    for rank in results[:1] if layout == "one" else results[1:]:
        whole, cut, same = (rank[method, batch, layout][k] for k in ("whole", "cut", "same"))
        assert same["losses"] == whole["losses"] and len(whole["losses"]) == STEPS
        assert cut["rows"] + same["rows"] == whole["rows"] and len(cut["rows"]) == STOP
        assert list(same["weights"]) == list(whole["weights"])
        for name, weight in whole["weights"].items():
            assert torch.equal(weight, same["weights"][name]), name
            assert not torch.equal(weight, cut["weights"][name]) or not weight.any(), name


@pytest.mark.processes
@pytest.mark.parametrize(("source", "target", "batch"), MOVES)
def test_full_fine_tuning_resumes_in_another_layout(source: str, target: str, batch: str, results: list) -> None:
    wholes = results[:1] * 2 if source == "one" else results[1:]
    for whole, moved in zip(wholes, results[:1] if target == "one" else results[1:]):
        wanted = whole["full", batch, source]["whole"]["losses"]
        assert moved[source, target]["losses"] == pytest.approx(wanted, rel=1e-6)
