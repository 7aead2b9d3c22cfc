"""Self checks: each failure that must not pass silently is provoked once."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback

from graftwork.errors import TrainingError
from graftwork.peft import IA3, LoRA
from graftwork.training.callbacks import SelfCheck
from graftwork.training.checksums import changed, checksum, checksums
from tests.helpers import tiny_run
from tests.helpers.distributed import run_ranks
from tests.helpers.standin import Rows, StandIn, trainer_for
from tests.helpers.tiny_run import finetune


def run(data: Path, root: Path, callback: Callback, peft: Any = None, **optim: Any) -> None:
    trainer = tiny_run.trainer(root, max_steps=2, limit_val_batches=0, callbacks=[callback])
    stack = peft or [LoRA(dim=4), IA3()]
    finetune(tiny_run.model(), trainer, tiny_run.data_module(data), stack, tiny_run.optim(**optim))


class Spoil(Callback):
    """Calls ``what(model)`` at one moment."""

    def __init__(self, moment: str, what: Callable[[Any], None]) -> None:
        setattr(self, moment, lambda trainer, model, *_: what(model))


def named(model: Any, text: str) -> list[torch.nn.Parameter]:
    return [p for n, p in model.named_parameters() if text in n]


@pytest.mark.fault(
    "a NaN goes on into the weights",
    "the step is refused before the update, naming file and lines",
)
def test_nan_loss_stops_before_the_update_and_names_file_and_lines(tiny_data: Path, tmp_path: Path) -> None:
    before: list[torch.Tensor] = []

    def poison(model: Any) -> None:
        weights = named(model, "lora_A")
        weights[0].data[0, 0] = float("nan")
        before.extend(w.detach().clone() for w in weights)

    def compare(model: Any) -> None:
        assert all(torch.equal(a, b, ) or a.isnan().any() for a, b in zip(before, named(model, "lora_A")))  # fmt: skip

    spoil = Spoil("on_train_start", poison)
    spoil.on_exception = lambda trainer, model, error: compare(model)  # type: ignore[method-assign]
    with pytest.raises(TrainingError, match=r"step 1: the loss is nan; look at the rows .*train.jsonl.*line \d+"):
        run(tiny_data, tmp_path, spoil)
    assert not (tmp_path / "summary.json").exists()


class PoisonedRow(StandIn):
    """One row, and so one microbatch on one rank, has an infinite loss."""

    def forward_step(self, iterator: Any, module: Any) -> Any:
        batch = next(iterator)
        output, loss_func = super().forward_step(iter([batch]), module)
        bad = float("inf") if 2003 in batch.rows else 1.0
        return output, lambda losses: loss_func(losses * bad)


def poisoned_ranks(rank: int, world_size: int, layout: dict[str, Any]) -> str:
    """Return the error's text."""
    trainer = trainer_for(layout, world_size, rank, callbacks=[SelfCheck()])
    try:
        trainer.fit(PoisonedRow(), datamodule=Rows())
    except TrainingError as error:
        return str(error)
    return "no error"


@pytest.mark.fault(
    "NaN in one rank: the others go on, or hang",
    "all ranks stop together and name the row",
)
@pytest.mark.processes
@pytest.mark.parametrize("layout", [{}, {"pipeline_model_parallel_size": 2}], ids=["dp2", "pp2"])
def test_infinite_loss_is_traced_to_its_row_on_whichever_rank(layout: dict) -> None:
    texts = run_ranks(poisoned_ranks, 2, layout)
    assert texts == ["step 2: the loss is inf; look at the rows 2003. Nothing was updated."] * 2


@pytest.mark.fault(
    "an adapter that no gradient reaches trains to the end",
    "after the first step every adapter must have had a gradient",
)
def test_an_adapter_without_gradient_is_named(tiny_data: Path, tmp_path: Path) -> None:
    def cut(model: Any) -> None:
        for parameter in named(model, ".adapters.ia3."):
            parameter.grad.zero_()

    with pytest.raises(TrainingError, match="no gradient reaches ia3"):
        run(tiny_data, tmp_path, Spoil("on_after_backward", cut))


def test_a_gradient_on_the_base_is_named(tiny_data: Path, tmp_path: Path) -> None:
    def stray(model: Any) -> None:
        weight = next(p for n, p in model.named_parameters() if n.endswith("linear_proj.weight"))
        weight.grad = torch.ones_like(weight)

    with pytest.raises(TrainingError, match=r"frozen parameters have gradients: .*linear_proj\.weight"):
        run(tiny_data, tmp_path, Spoil("on_after_backward", stray))


@pytest.mark.fault(
    "the base is silently unfrozen",
    "the base's checksum is compared at the end",
)
def test_a_moved_base_is_named(tiny_data: Path, tmp_path: Path) -> None:
    def move(model: Any) -> None:
        named(model, "final_layernorm.weight")[0].data[3] += 1e-6

    with pytest.raises(TrainingError, match=r"the frozen base has changed: .*final_layernorm\.weight"):
        run(tiny_data, tmp_path, Spoil("on_train_batch_end", move))


@pytest.mark.fault(
    "a learning rate of zero trains nothing",
    "at the end every B must have moved",
)
def test_a_learning_rate_of_zero_is_noticed(tiny_data: Path, tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match="training has not moved ia3, lora; is the learning rate 0"):
        run(tiny_data, tmp_path, Callback(), lr=0.0)


def diverged(rank: int, world_size: int) -> str:
    """Let one replica drift and return the error's text."""

    def drift(model: Any) -> None:
        if rank == 1:
            next(iter(model.module.parameters())).data[0, 0] += 1e-3

    trainer = trainer_for({}, world_size, rank, callbacks=[Spoil("on_train_batch_end", drift), SelfCheck()])
    try:
        trainer.fit(StandIn(), datamodule=Rows())
    except TrainingError as error:
        return str(error)
    return "no error"


@pytest.mark.fault(
    "replicas drift apart",
    "checksums of what trains are compared over the ranks",
)
@pytest.mark.processes
def test_replicas_that_drift_apart_are_named() -> None:
    for text in run_ranks(diverged, 2):
        assert text.startswith("data-parallel ranks disagree on module.embedding.word_embeddings.weight")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_checksum_sees_one_bit_and_a_swap(dtype: torch.dtype) -> None:
    tensor = torch.randn(7, 5).to(dtype)
    other = tensor.clone()
    assert checksum(tensor) == checksum(other) == checksum(tensor.t().contiguous().t())
    other[3, 2] = torch.nextafter(other[3, 2], torch.tensor(9.0, dtype=dtype))
    swapped = tensor.clone()
    swapped[0, 0], swapped[0, 1] = tensor[0, 1], tensor[0, 0]
    assert changed(checksums([("x", tensor)]), checksums([("x", other)])) == ["x"]
    assert checksum(swapped) != checksum(tensor)


def test_nan_in_the_base_is_not_blamed_on_rows(tiny_data: Path, tmp_path: Path) -> None:
    model = tiny_run.model()
    model.configure_model()
    name, weight = next((n, p) for n, p in model.named_parameters() if "layers.1" in n and p.ndim == 2)
    with torch.no_grad():
        weight[0, 0] = float("nan")
    trainer = tiny_run.trainer(tmp_path)
    with pytest.raises(TrainingError, match=r"weights of the base are not finite: .*; no row is to blame") as told:
        finetune(model, trainer, tiny_run.data_module(tiny_data), [LoRA(dim=4)], tiny_run.optim())
    assert name in str(told.value).replace(".base.", ".") or name.rpartition(".")[0] in str(told.value)
    assert "train.jsonl" not in str(told.value)
