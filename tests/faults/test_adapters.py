"""Faults of adapters and their files that other libraries have shipped, planted here: what catches each by default."""

from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from graftwork.errors import ArtifactError, CheckpointError, GraftworkError, MatchError
from graftwork.models import GPT, adapters
from graftwork.peft import IA3, CanonicalAdapter, LoRA
from graftwork.peft.artifact import tensors
from graftwork.peft.trained import TrainedTensor
from tests.contracts.methods import make, shake, tokens


def trained(*stack: Any) -> GPT:
    model = make()
    model.add_adapter(list(stack) or [LoRA(dim=4), IA3()])
    shake(model)
    return model


def refused(path: Path, message: str, model: GPT | None = None, **options: Any) -> None:
    """Load into ``model`` (default: a fresh one): it must refuse and answer as before."""
    model = model or make()
    names, before = list(model.adapters), model(tokens())
    with pytest.raises(GraftworkError, match=message):
        model.load_adapters(path, **options)
    assert list(model.adapters) == names and torch.equal(model(tokens()), before)


def save_unproved(model: GPT, path: Path) -> None:
    """Save what the proof of every save would have refused."""
    with pytest.raises(ArtifactError, match="fails its proof"):
        model.save_adapters(path)
    assert not path.exists()
    model.save_adapters(path, verify=False)


def joined_as(change: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> Callable[[Any], dict[str, Tensor]]:
    exact = tensors._joined
    return lambda sent: change(exact(sent))


@pytest.mark.fault(
    "the keys of a saved adapter carry another prefix, so that the loader takes none and the base answers",
    "loading refuses tensors that its stack does not have and lists one",
)
def test_another_prefix(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = trained()
    with monkeypatch.context() as planted:
        planted.setattr(TrainedTensor, "key", property(lambda t: f"base_model.model.{t.adapter}.{t.site}.{t.name}"))
        save_unproved(model, tmp_path / "adapter")
    refused(tmp_path / "adapter", "tensors its stack does not have, e.g. 'base_model.model")


@pytest.mark.fault(
    "tensors are missing in a saved adapter and the modules stay at their initial values with a warning",
    "loading refuses a file that lacks a tensor of its stack",
)
def test_missing_tensors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = trained()
    with monkeypatch.context() as planted:
        kept = joined_as(lambda found: {k: t for k, t in found.items() if not k.endswith("lora_B")})
        planted.setattr(tensors, "_joined", kept)
        save_unproved(model, tmp_path / "adapter")
    refused(tmp_path / "adapter", "lacks 8 tensors of its stack")


@pytest.mark.fault(
    "an adapter saved under tensor parallelism keeps the first rank's rows",
    "shapes in the file's header are compared with the model's full shapes before anything is allocated",
)
def test_one_ranks_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = trained()
    with monkeypatch.context() as planted:
        half = joined_as(lambda found: {k: t[: max(1, len(t) // 2)].clone() for k, t in found.items()})
        planted.setattr(tensors, "_joined", half)
        save_unproved(model, tmp_path / "adapter")
    refused(tmp_path / "adapter", "has shape .* but the model needs")


@pytest.mark.fault(
    "a cut tensor is averaged over ranks, not joined, when the layout changes",
    "the mean has one rank's shape, which is not the model's full shape",
)
def test_parts_are_averaged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = trained()
    with monkeypatch.context() as planted:
        mean = joined_as(
            lambda found: {k: torch.stack(t.chunk(2)).mean(0) if len(t) > 1 else t for k, t in found.items()}
        )
        planted.setattr(tensors, "_joined", mean)
        save_unproved(model, tmp_path / "adapter")
    refused(tmp_path / "adapter", "has shape .* but the model needs")


@pytest.mark.fault(
    "adapters loaded one by one stand in another order than they were trained in",
    "an artifact remembers its whole stack; two adapters at one module are never turned round",
)
def test_another_order(tmp_path: Path) -> None:
    path, model = trained().save_adapters(tmp_path / "adapter"), make()
    model.load_adapters(path, names=["ia3"])
    refused(path, "was saved with 'lora' inside of 'ia3'", model, names=["lora"])


@pytest.mark.fault(
    "one of several targets is mistyped and silently adapts nothing",
    "every target must match; near names are listed",
)
@pytest.mark.parametrize("targets", [["linear_qkv", "linear_fc"], ["q_proj"], ["Linear_qkv"], ["linear_qkv "]])
def test_mistyped_targets(targets: list[str]) -> None:
    model = make()
    with pytest.raises(MatchError, match="matches no module"):
        model.add_adapter(LoRA(dim=4, target_modules=targets))
    assert not model.adapters


@pytest.mark.fault(
    "layer 1 is asked for and layers 10 to 19 are adapted too",
    "targets match whole parts of a name",
)
def test_layer_one_is_not_layer_ten() -> None:
    model = make(sizes={"num_layers": 11})
    model.add_adapter(LoRA(dim=4, target_modules=["layers.1.mlp.linear_fc1"]))
    assert {g.site.layer for g in model.stack.grafted["lora"]} == {1}


@pytest.mark.fault(
    "an adapter that holds NaN is saved and loaded",
    "saving refuses a value that is not finite; loading refuses one that was written all the same",
)
def test_nan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = trained()
    next(model.stack.adapters("lora")).lora_A.data[0, 0] = float("nan")  # type: ignore[operator]
    with pytest.raises(CheckpointError, match="holds NaN or Inf"):
        model.save_adapters(tmp_path / "adapter")
    with monkeypatch.context() as planted:
        planted.setattr(torch, "isfinite", lambda tensor: torch.ones_like(tensor, dtype=torch.bool))
        save_unproved(model, tmp_path / "adapter")
    refused(tmp_path / "adapter", "holds NaN or Inf")


@pytest.mark.fault(
    "the configuration of one adapter is read with the tensors of another, saved to the same place meanwhile",
    "one checksum covers both files, and only bytes that it covered are read",
)
def test_two_saves_mixed(tmp_path: Path) -> None:
    model = trained()
    first = model.save_adapters(tmp_path / "first")
    shake(model)
    second = model.save_adapters(tmp_path / "second")
    name = "adapter_model.safetensors"
    (first / name).write_bytes((second / name).read_bytes())
    refused(first, "checksum does not match")


@pytest.mark.fault(
    "adding a second method freezes the first and drops it from the saved file",
    "every adapter keeps its flag and all of the stack is saved",
)
def test_the_first_method_is_kept(tmp_path: Path) -> None:
    model = trained(LoRA(dim=4))
    model.add_adapter(CanonicalAdapter(dim=4))
    assert {n.split(".adapters.")[1].split(".")[0] for n, p in model.named_parameters() if p.requires_grad} == {
        "lora",
        "canonical_adapter",
    }
    twin = make()
    twin.load_adapters(model.save_adapters(tmp_path / "adapter"))
    assert list(twin.adapters) == ["lora", "canonical_adapter"] and torch.equal(twin(tokens()), model(tokens()))


@pytest.mark.fault(
    "a load that fails half-way leaves some of the new values in the attached adapters",
    "values are read and checked first, and given back when anything fails after",
)
def test_half_a_load(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, model = trained().save_adapters(tmp_path / "adapter"), trained()
    shake(model)
    before = model(tokens())

    def refuse(*_: Any) -> None:
        raise ArtifactError("planted after the values were copied")

    with monkeypatch.context() as planted:
        planted.setattr(adapters, "prompt_formats", refuse)
        refused(path, "planted", model)
    assert torch.equal(model(tokens()), before)


@pytest.mark.fault(
    "weights are merged twice, so that the adapter counts double",
    "a merged adapter is not merged again; unmerging gives back every bit",
)
def test_merged_twice() -> None:
    model = trained(LoRA(dim=4))
    base = {n: p.detach().clone() for n, p in model.named_parameters()}
    model.merge_adapters()
    once = model(tokens())
    with suppress(GraftworkError):  # a refusal is as good
        model.merge_adapters()
    assert torch.equal(model(tokens()), once)
    model.unmerge_adapters()
    assert all(torch.equal(p, base[n]) for n, p in model.named_parameters())
