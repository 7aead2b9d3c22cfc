"""A training state carried through layouts keeps every bit; ranks refuse a state, or fail to write one, together."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.strategies import filesystem_async
from torch import Tensor

from graftwork import parallel
from graftwork.errors import CheckpointError
from graftwork.layout import Layout
from graftwork.models import GPT
from graftwork.optim import AdamW
from graftwork.parallel.collective import barrier
from graftwork.peft import IA3, CanonicalAdapter, LoRA, PTuning
from graftwork.training.optimizer import Update
from graftwork.training.state import checkpoint
from tests.contracts.methods import shape
from tests.helpers.distributed import run_ranks
from tests.helpers.layouts import layout_of
from tests.helpers.lightning_state import lightning_state

EXPERTS = {"num_moe_experts": 4, "moe_router_topk": 2, "moe_ffn_hidden_size": 48}
SOME = {**EXPERTS, "moe_layer_freq": [0, 1]}
TIED = {"family": "llama_tied", "num_layers": 4}


def _every_kind() -> list:
    some = [LoRA("one", dim=4, layers=[1]), IA3("two", layers=[0]), CanonicalAdapter("three", dim=4, layers=[1])]
    vocabulary = LoRA("head", dim=4, target_modules=["output_layer", "word_embeddings"])
    return [LoRA(dim=4), *some, vocabulary, PTuning(virtual_tokens=3, embedding_dim=8, bottleneck_dim=8)]


MODELS: dict[str, dict[str, Any]] = {
    "full": {"shape": {}},
    "tied_bf16": {"shape": TIED, "dtype": "bf16"},
    "experts": {"shape": EXPERTS},
    "adapters": {"shape": {}, "stack": _every_kind},
    "in_experts": {"shape": EXPERTS, "stack": lambda: [LoRA(dim=4, target_modules=["linear_fc1", "linear_fc2"])]},
    "some_layers": {"shape": SOME, "stack": lambda: [LoRA(dim=4), IA3()]},
    "first_stage_only": {"shape": {}, "stack": lambda: [PTuning(virtual_tokens=3, embedding_dim=8, bottleneck_dim=8)]},
}
WALKS: dict[str, list[dict[str, int]]] = {
    "full": [{"tensor": 2}, {"pipeline": 2}, {}, {"tensor": 2}, {"context": 2}],
    "tied_bf16": [{"pipeline": 2}, {"tensor": 2}, {}, {"pipeline": 2}],
    "experts": [{"expert": 2}, {"tensor": 2}, {"pipeline": 2}],
    "adapters": [{"tensor": 2}, {"pipeline": 2}, {}, {"tensor": 2}],
    "in_experts": [{"expert": 2}, {"tensor": 2}, {"tensor": 2, "expert": 2}],
    "some_layers": [{"expert": 2}, {"pipeline": 2}, {"tensor": 2, "expert": 2}],
    "first_stage_only": [{"pipeline": 2}, {"tensor": 2}],
}


def made(name: str, seed: int) -> tuple[GPT, torch.optim.Optimizer]:
    """Build a model whose trained tensors differ with ``seed``, and its optimizer, in the layout of the moment."""
    options = MODELS[name]
    family = {"family": "llama", **options["shape"]}
    model = GPT(shape(**family), dtype=options.get("dtype", "fp32"), seed=seed)
    if "stack" in options:
        model.add_adapter(options["stack"]())
    model.configure_model()
    optimizer, _ = AdamW(lr=1e-3, schedule="constant").build(model, 10)
    return model, optimizer


def shared(model: GPT, optimizer: torch.optim.Optimizer) -> Update:
    """Return an update whose state the ranks that hold the same weights share out: two in layouts that name no two."""
    update = Update(model.chunks)
    update.accumulate(sharded=True)
    update.step_with([optimizer])
    return update


def save(update: Update, path: Path) -> None:
    checkpoint.save(path, lightning_state(3), update, Layout())


def load(update: Update, path: Path) -> None:
    _, state = checkpoint.read_common(path)
    checkpoint.read_weights(path, state, update)
    checkpoint.read_optimizer(path, state, update)


def walk(rank: int, world_size: int, root: Path) -> None:
    """Carry every state through its layouts, writing it down again in each."""
    for name, layouts in WALKS.items():
        for index, sizes in enumerate(layouts):
            parallel.initialize(layout_of(**sizes))
            update = shared(*made(name, seed=77 + index))
            load(update, root / name / str(index))
            save(update, root / name / str(index + 1))


def write_first(name: str, root: Path) -> None:
    """Save a state whose tensors, moments and masters are all different random numbers, none of them zero."""
    parallel.ensure_initialized()
    model, optimizer = made(name, seed=5)
    for parameter in (p for p in model.parameters() if p.requires_grad):
        parameter.grad = torch.randn_like(parameter)
        with torch.no_grad():
            parameter.add_(torch.rand_like(parameter))
    optimizer.step()
    save(Update(model.chunks, [optimizer]), root / name / "0")
    parallel.destroy()


@pytest.fixture(scope="module")
def walked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("walks")
    for name in WALKS:
        write_first(name, root)
    run_ranks(walk, 2, root, timeout=300)
    return root


def tensors(path: Path) -> dict[str, Tensor]:
    """Return every full tensor of a state, read by megatron-core in one process."""
    return dist_checkpointing.load_plain_tensors(str(path / checkpoint.TENSORS))


@pytest.mark.fault(
    "resharding averages adapters",
    "parts are joined and cut, never averaged: every bit stays",
)
@pytest.mark.processes
@pytest.mark.parametrize("name", WALKS)
def test_every_tensor_keeps_its_bits_in_every_layout(name: str, walked: Path) -> None:
    parallel.ensure_initialized()
    first = tensors(walked / name / "0")
    kinds = {"master"} if name == "tied_bf16" else {"exp_avg_sq"}
    assert kinds <= {key.split(".")[2] for key in first if key.startswith("optimizer.state.")}
    for index in range(1, len(WALKS[name]) + 1):
        found = tensors(walked / name / str(index))
        assert set(found) == set(first)
        for key, value in first.items():
            same = found[key][: len(value)]  # an odd vocabulary is padded under tensor parallelism
            assert torch.equal(same, value), (key, index)
            assert len(found[key]) == len(value) or ("word_embeddings" in key or "output_layer" in key), key
        state = json.loads((walked / name / str(index) / "state.json").read_text())
        assert state["optimizer_step"] == 1.0
    parallel.destroy()


def refusals(rank: int, world_size: int, root: Path) -> dict[str, str]:
    """Break reading and writing on one rank at a time; return the error that this rank got."""
    parallel.initialize(layout_of(tensor=2))
    model, optimizer = made("adapters", seed=5)
    update = Update(model.chunks, [optimizer])
    save(update, root / "good")
    found = {}
    for culprit in (0, 1):
        elsewhere = root / ("missing" if rank == culprit else "good")
        found[f"read {culprit}"] = _error(lambda at=elsewhere: checkpoint.read_common(at))
        state = checkpoint.read_common(root / "good")[1]
        found[f"weights {culprit}"] = _error(lambda at=elsewhere, s=state: checkpoint.read_weights(at, s, update))
        found[f"random {culprit}"] = _error(lambda at=elsewhere, s=state: _read_random(at, s))
    for what in ("_write_item", "finish", "save_config"):
        for culprit in (0, 1) if what == "_write_item" else (0,):
            with pytest.MonkeyPatch.context() as patch:
                if rank == culprit:
                    _break(patch, what)
                found[f"{what} {culprit}"] = _error(lambda: save(update, root / "bad"))
            barrier()
            assert not list(root.glob("*bad*")) and not list(root.glob(".*")), what
    save(update, root / "bad")
    return found


def _read_random(path: Path, state: checkpoint.Facts) -> None:
    state = state.model_copy(update={"world_size": 2})
    checkpoint.read_random_state(path, state, Layout(**state.layout))


def _break(patch: pytest.MonkeyPatch, what: str) -> None:
    def no_room(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    targets = {
        "_write_item": filesystem_async,
        "finish": filesystem_async.FileSystemWriterAsync,
        "save_config": dist_checkpointing.serialization,
    }
    patch.setattr(targets[what], what, no_room)


def _error(action: Any) -> str:
    with pytest.raises(CheckpointError) as refused:
        action()
    return str(refused.value)


@pytest.mark.processes
def test_what_one_rank_cannot_read_or_write_every_rank_refuses(tmp_path: Path) -> None:
    first, second = run_ranks(refusals, 2, tmp_path, timeout=120)
    for case, message in first.items():
        if case.split()[0] in ("read", "weights", "random"):
            assert message.replace("missing", "good") == second[case].replace("missing", "good"), case
            assert "missing" in message and os.linesep not in message, case
        else:
            assert "disk is full" in message and "No space left" in second[case], case
