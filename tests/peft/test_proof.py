"""Every save is proved from its files: what differs is refused, what was there stays, the model keeps every bit."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from graftwork.errors import ArtifactError
from graftwork.models import GPT, proof
from graftwork.models.base import Model
from graftwork.peft import LoRA, PromptTuning, PTuning
from graftwork.peft.artifact import directory as artifact
from tests.contracts.methods import STACKS, every_stack, make, shake
from tests.helpers import tiny_t5

PROOF = "proof.json"


def trained(stack: str = "lora+ia3", **options: Any) -> GPT:
    model = make(**options)
    model.add_adapter(STACKS[stack]())
    shake(model)
    return model


def state(model: Model) -> dict[str, Any]:
    """Return all that training would see: values, objects, flags, modes, prompts, random states."""
    return {
        "values": {n: p.detach().clone() for n, p in model.named_parameters()},
        "objects": [id(p) for p in model.parameters()],
        "trains": [p.requires_grad for p in model.parameters()],
        "gradients": [p.grad is None for p in model.parameters()],
        "modes": [(id(module), module.training) for module in model.modules()],
        "adapters": [(id(a), a.enabled, a.merged, a.training) for a in model.stack.adapters()],
        "prompts": model.prompt_layout,
        "random": torch.get_rng_state().tolist(),
    }


def same(first: dict[str, Any], second: dict[str, Any]) -> bool:
    values = first["values"], second["values"]
    equal = list(values[0]) == list(values[1]) and all(torch.equal(a, b) for a, b in zip(*(v.values() for v in values)))
    return equal and all(first[key] == second[key] for key in first if key != "values")


def content(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((path / PROOF).read_text())
    return found


@every_stack
def test_a_save_is_proved_and_leaves_the_model_as_it_was(stack: str, tmp_path: Path) -> None:
    model = trained(stack)
    model.train()
    before = state(model)
    model.save_adapters(tmp_path / "adapter")
    assert same(state(model), before)
    views = content(tmp_path / "adapter")["views"]
    names = list(model.adapters)
    wanted = [[], names, *([[name] for name in names] if len(names) > 1 else [])]
    assert [view["adapters"] for view in views] == wanted
    assert len({view["digest"] for view in views}) == len(views), "each adapter counts in the probe"
    twin = make()
    twin.load_adapters(tmp_path / "adapter")
    assert all(c.ok and c.exact and c.difference == 0 for c in twin.verify_adapters(tmp_path / "adapter"))
    shake(twin, 0.01)
    found = twin.verify_adapters(tmp_path / "adapter")
    assert found[0].ok and not any(c.ok for c in found[1:]), "other values are told apart"


@pytest.mark.parametrize("stack", ["lora", "ia3", "ptuning", "all", "tasks"])
def test_a_proof_holds_the_logits_of_a_plain_forward_pass(stack: str, tmp_path: Path) -> None:
    """The oracle puts virtual tokens in front itself and calls the model as a user does."""
    model = trained(stack)
    model.save_adapters(tmp_path / "adapter")
    held = content(tmp_path / "adapter")
    whole, bare = [], []
    for prompt, answer, task in zip(*(held["probe"][key] for key in ("prompts", "answers", "tasks"))):
        virtual = [i for slot in model.prompt_layout.slots if slot.task in (None, task) for i in slot.ids]
        for ids, found in ((virtual + prompt + answer, whole), (prompt + answer, bare)):
            with torch.no_grad():
                if found is whole:
                    found.append(model(torch.tensor([ids]))[0, -len(answer) - 1 : -1])
                else:
                    with model.adapters_disabled():
                        found.append(model(torch.tensor([ids]))[0, -len(answer) - 1 : -1])
    for view, logits in zip(held["views"], (torch.cat(bare), torch.cat(whole))):
        values = torch.tensor(view["values"])
        assert (values - logits[:, held["columns"]]).abs().max() <= 1e-5 * logits.abs().max()
        assert view["scale"] == pytest.approx(float(logits.abs().max()), rel=1e-5)
    assert held["probe"]["tasks"] == (["a", "b"] if stack == "tasks" else [None, None])


def written(change: Callable[[dict[str, Tensor]], None]) -> Callable[..., None]:
    """Return a writer of tensors with a fault."""

    def write(tensors: dict[str, Tensor], *where: Any, **options: Any) -> None:
        damaged = dict(tensors)
        change(damaged)
        save_file(damaged, *where, **options)

    return write


def swapped(tensors: dict[str, Tensor]) -> None:
    key = next(key for key in tensors if key.endswith("lora_B"))
    tensors[key] = tensors[key][[1, 0, *range(2, len(tensors[key]))]].contiguous()


def one_bit(tensors: dict[str, Tensor]) -> None:
    key = list(tensors)[-1]
    bits = tensors[key].view(torch.int32).clone()
    bits.view(-1)[-1] ^= 1
    tensors[key] = bits.view(torch.float32)


def halved(tensors: dict[str, Tensor]) -> None:
    key = next(key for key in tensors if key.endswith("lora_B"))
    tensors[key] = tensors[key].chunk(2)[0].contiguous()


def dropped(tensors: dict[str, Tensor]) -> None:
    del tensors[list(tensors)[3]]


def renamed(tensors: dict[str, Tensor]) -> None:
    tensors["base_model.model.x"] = tensors.pop(list(tensors)[3])


WRITTEN = {
    swapped: "has other values",
    one_bit: "has other values",
    halved: "has shape",
    dropped: "is missing",
    renamed: "is",
}


def lost_scale(entries: list[dict[str, Any]]) -> None:
    entries[0]["hyperparameters"]["alpha"] = 7


def lost_adapter(entries: list[dict[str, Any]]) -> None:
    del entries[1]


DESCRIBED = {lost_scale: "describes 'lora' as", lost_adapter: "names adapters"}


def refused(model: GPT, path: Path, words: str) -> None:
    """Ask for one sentence, everything on the disk as it was, the model too."""
    files = {p.name: p.read_bytes() for p in path.iterdir()}
    before = state(model)
    with pytest.raises(ArtifactError, match="The adapter was not saved: what was written fails its proof") as caught:
        model.save_adapters(path)
    assert words in str(caught.value) and "\n" not in str(caught.value)
    assert {p.name: p.read_bytes() for p in path.iterdir()} == files
    assert [p.name for p in path.parent.iterdir()] == [path.name]
    assert same(state(model), before)


@pytest.mark.parametrize("change", WRITTEN)
def test_a_file_that_was_written_wrong_is_never_published(
    change: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = trained()
    model.save_adapters(tmp_path / "adapter", step=1)
    monkeypatch.setattr(artifact, "save_file", written(change))
    refused(model, tmp_path / "adapter", WRITTEN[change])
    model.save_adapters(tmp_path / "adapter", verify=False)  # nothing else would have noticed
    assert not (tmp_path / "adapter" / PROOF).exists()


@pytest.mark.parametrize("change", DESCRIBED)
def test_a_configuration_of_another_function_is_never_published(
    change: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = trained()
    model.save_adapters(tmp_path / "adapter", step=1)
    exact = artifact.entries_of

    def entries(*about: Any) -> list[dict[str, object]]:
        found = exact(*about)
        change(found)
        return found

    monkeypatch.setattr(artifact, "entries_of", entries)
    refused(model, tmp_path / "adapter", DESCRIBED[change])


def test_a_tensor_that_was_brought_together_wrong_is_never_published(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The file holds what it was given, which is not what was trained: one bit of it, that no logit shows."""
    model = trained()
    model.save_adapters(tmp_path / "adapter", step=1)
    exact = artifact.bring_together

    def wrong(*about: Any) -> dict[str, Tensor]:
        tensors = {key: tensor.clone() for key, tensor in (exact(*about) or {}).items()}
        one_bit(tensors)
        return tensors

    monkeypatch.setattr(artifact, "bring_together", wrong)
    refused(model, tmp_path / "adapter", "differs from the trained one")


def test_logits_catch_what_tensors_and_options_do_not_tell(tmp_path: Path) -> None:
    """A live adapter whose scale is another than its options say: the files hold all of it but that."""
    model = trained("lora")
    model.save_adapters(tmp_path / "adapter")
    for adapter in model.stack.adapters():
        adapter.low_rank = replace(adapter.low_rank, scale=2 * adapter.low_rank.scale)
    refused(model, tmp_path / "adapter", "from the files are")


def test_a_tuple_is_a_list_on_the_disk(tmp_path: Path) -> None:
    model = make()
    model.add_adapter(LoRA(dim=4, target_modules=("linear_qkv", "linear_fc1")))  # type: ignore[arg-type]
    model.save_adapters(tmp_path / "adapter")


def test_logits_that_are_no_numbers_are_refused(tmp_path: Path) -> None:
    model = trained()
    model.save_adapters(tmp_path / "adapter")
    next(p for n, p in model.named_parameters() if "linear_fc2.weight" in n).data.fill_(float("inf"))
    with pytest.raises(ArtifactError, match="hold NaN or Inf"):
        model.save_adapters(tmp_path / "adapter")


def test_merged_and_switched_off_adapters_have_the_same_proof(tmp_path: Path) -> None:
    model = trained("lora+selective")
    model.save_adapters(tmp_path / "live")
    with model.adapters_disabled():
        model.save_adapters(tmp_path / "off")
    live = state(model)
    model.merge_adapters(["lora"])
    model.save_adapters(tmp_path / "merged")
    with model.adapters_disabled():
        model.save_adapters(tmp_path / "both")
    assert len({(tmp_path / name / PROOF).read_text() for name in ("live", "off", "merged", "both")}) == 1
    model.unmerge_adapters()
    assert same(state(model), live)


def test_switched_off_prompts_are_proved_too(tmp_path: Path) -> None:
    model = trained("all")
    model.save_adapters(tmp_path / "live")
    with model.adapters_disabled():
        model.save_adapters(tmp_path / "off")
        assert all(c.exact for c in model.verify_adapters(tmp_path / "live"))
        assert model.prompt_layout.off
    assert (tmp_path / "live" / PROOF).read_text() == (tmp_path / "off" / PROOF).read_text()


def test_some_of_a_stack_are_proved_without_the_others(tmp_path: Path) -> None:
    """A prompt has other virtual ids beside another prompt: the proof does not depend on them."""
    model = make()
    model.add_adapter(
        [PTuning("first", 2, embedding_dim=4, bottleneck_dim=4), PromptTuning(init="random"), LoRA(dim=4)]
    )
    shake(model)
    model.save_adapters(tmp_path / "some", names=["prompt_tuning", "lora"])
    alone = make()
    alone.load_adapters(tmp_path / "some")
    assert alone.prompt_layout.slots[0].offset == 0 != model.prompt_layout.slots[1].offset
    for held in (model, alone):
        assert all(c.exact for c in held.verify_adapters(tmp_path / "some"))


@pytest.mark.parametrize("stack", ["lora", "ia3", "all", "tasks", "lora+selective"])
@pytest.mark.parametrize("kind", ["t5", "mt5"])
def test_t5(kind: str, stack: str, tmp_path: Path) -> None:
    model, twin = tiny_t5.tiny(kind), tiny_t5.tiny(kind)
    model.add_adapter(STACKS[stack]())
    shake(model, 0.05)
    before = state(model)
    model.save_adapters(tmp_path / "adapter")
    assert same(state(model), before)
    twin.load_adapters(tmp_path / "adapter")
    assert all(c.exact for c in twin.verify_adapters(tmp_path / "adapter"))
    effects = [c.effect for c in twin.verify_adapters(tmp_path / "adapter")]
    assert effects[0] == 0 and min(effects[1:]) > 1e-3


def test_a_probe_that_fails_halfway_leaves_everything(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = trained("lora+selective")
    model.merge_adapters(["lora"])
    exact, left = proof.target_logits, [0]

    def failing(*about: Any) -> Tensor:
        left[0] -= 1
        if left[0] < 0:
            raise RuntimeError("out of memory")
        return exact(*about)

    monkeypatch.setattr(proof, "target_logits", failing)
    for left[0] in (0, 2, 5):
        before = state(model)
        with pytest.raises(RuntimeError):
            model.save_adapters(tmp_path / "adapter")
        assert same(state(model), before) and not list(tmp_path.iterdir())


def test_without_room_for_a_row_there_is_no_proof(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = make()
    model.add_adapter(PromptTuning(virtual_tokens=63, init="random"))
    model.save_adapters(tmp_path / "adapter")
    assert not (tmp_path / "adapter" / PROOF).exists() and "carries no proof" in caplog.text
    with pytest.raises(ArtifactError, match="carries no proof"):
        model.verify_adapters(tmp_path / "adapter")


def test_a_base_in_bf16_is_proved_in_bf16(tmp_path: Path) -> None:
    model = trained("lora+selective", dtype="bf16")
    before = state(model)
    model.save_adapters(tmp_path / "adapter")
    assert same(state(model), before) and content(tmp_path / "adapter")["dtype"] == "bf16"
