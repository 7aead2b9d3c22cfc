"""The order of a stack travels with its artifacts: adapters at one module stand as they stood when they were saved."""

import json
from pathlib import Path

import pytest
import torch

from graftwork.errors import ArtifactError
from graftwork.models import GPT
from graftwork.peft import IA3, CanonicalAdapter, LoRA, PTuning
from graftwork.peft.artifact import directory as artifact
from tests.contracts.methods import make, prompted, shake, tokens

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
REVERSED = (
    "was saved with 'lora' inside of 'ia3' at .*, but here 'ia3' would stand inside; delete 'ia3' and load it after"
)


@pytest.fixture(scope="module")
def model() -> GPT:
    model = make()
    model.add_adapter([LoRA(dim=4), IA3(), CanonicalAdapter(dim=4), PTuning(virtual_tokens=2, bottleneck_dim=8)])
    shake(model)
    return model


def logits(model: GPT) -> torch.Tensor:
    with torch.no_grad():
        return model(prompted(model, tokens()))


@pytest.mark.parametrize("names", [["ia3", "lora"], ["lora", "ia3"]])
def test_names_are_saved_and_loaded_inner_to_outer_however_they_are_named(
    names: list[str], model: GPT, tmp_path: Path
) -> None:
    model.save_adapters(tmp_path / "all")
    wanted = make()
    wanted.load_adapters(tmp_path / "all", names=["lora", "ia3"])
    model.save_adapters(tmp_path / "two", names=names)
    for twin, path in ((make(), "two"), (make(), "all")):
        twin.load_adapters(tmp_path / path, names=names)
        assert list(twin.adapters) == ["lora", "ia3"] and torch.equal(logits(twin), logits(wanted))


@pytest.mark.parametrize("apart", [False, True])
def test_one_by_one_in_another_order_is_refused_and_in_its_order_equal(apart: bool, model: GPT, tmp_path: Path) -> None:
    """Whether both come from one artifact or each from its own: each remembers the whole stack."""
    places = {name: tmp_path / (name if apart else "both") for name in ("lora", "ia3")}
    for name, place in places.items():
        model.save_adapters(place, names=[name] if apart else ["lora", "ia3"])
    twin = make()
    twin.load_adapters(places["ia3"], names=["ia3"])
    before = {n: (p.requires_grad, p.detach().clone()) for n, p in twin.named_parameters()}
    with pytest.raises(ArtifactError, match=REVERSED):
        twin.load_adapters(places["lora"], names=["lora"])
    with pytest.raises(ArtifactError, match=REVERSED if not apart else "has no adapter 'ia3'"):
        twin.load_adapters(places["lora"], names=["lora", "ia3"])
    after = dict(twin.named_parameters())
    assert list(after) == list(before) and list(twin.adapters) == ["ia3"]
    assert all(after[n].requires_grad == flag and torch.equal(after[n], value) for n, (flag, value) in before.items())
    twin.delete_adapter("ia3")
    for name, place in places.items():
        twin.load_adapters(place, names=[name])
    together = make()
    model.save_adapters(tmp_path / "together", names=["lora", "ia3"])
    together.load_adapters(tmp_path / "together")
    assert torch.equal(logits(twin), logits(together))


def test_values_do_not_go_into_a_stack_of_another_order(model: GPT, tmp_path: Path) -> None:
    model.save_adapters(tmp_path / "two", names=["lora", "ia3"])
    twin = make()
    twin.add_adapter([IA3(), LoRA(dim=4)])
    before = logits(twin)
    with pytest.raises(ArtifactError, match=REVERSED):
        twin.load_adapters(tmp_path / "two")
    assert torch.equal(logits(twin), before)


def test_adapters_that_share_no_module_load_in_any_order(model: GPT, tmp_path: Path) -> None:
    model.save_adapters(tmp_path / "all")
    twin, straight = make(), make()
    straight.load_adapters(tmp_path / "all")
    for name in ("ptuning", "canonical_adapter"):
        twin.load_adapters(tmp_path / "all", names=[name])
    twin.load_adapters(tmp_path / "all", names=["lora", "ia3"])
    assert torch.equal(logits(twin), logits(straight))


def test_two_prompts_keep_the_order_of_their_virtual_tokens(tmp_path: Path) -> None:
    model = make()
    model.add_adapter([PTuning(name, virtual_tokens=2, embedding_dim=8, bottleneck_dim=8) for name in ("p", "q")])
    model.save_adapters(tmp_path / "both")
    twin = make()
    twin.load_adapters(tmp_path / "both", names=["q"])
    with pytest.raises(ArtifactError, match="saved with 'p' inside of 'q' at 'embedding.word_embeddings'"):
        twin.load_adapters(tmp_path / "both", names=["p"])


def test_an_adapter_unknown_to_the_artifact_stays_inside(model: GPT, tmp_path: Path) -> None:
    """Stacking onto other adapters is what was asked for; nothing says that they belong elsewhere."""
    model.save_adapters(tmp_path / "one", names=["ia3"])
    twin = make()
    twin.add_adapter(LoRA("mine", dim=4))
    twin.load_adapters(tmp_path / "one")
    assert list(twin.adapters) == ["mine", "ia3"]


def test_an_artifact_that_knows_no_stack_loads_in_its_own_order(model: GPT, tmp_path: Path) -> None:
    """Earlier versions wrote none."""
    path = model.save_adapters(tmp_path / "old", names=["lora", "ia3"])
    config = json.loads((path / CONFIG).read_text())
    del config["stack"]
    config["checksum"] = artifact._checksum(config, path / TENSORS)
    (path / CONFIG).write_text(json.dumps(config))
    twin = make()
    twin.load_adapters(path)
    assert list(twin.adapters) == ["lora", "ia3"]
    other = make()
    other.load_adapters(path, names=["ia3"])
    with pytest.raises(ArtifactError, match=REVERSED):
        other.load_adapters(path, names=["lora"])
