"""Artifacts and merges in every layout: saved anywhere, loaded anywhere, refused by all ranks or by none."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from graftwork import parallel
from graftwork.errors import ArtifactError, ConfigError, GraftworkError
from graftwork.models import GPT
from graftwork.peft import IA3, CanonicalAdapter, LoRA, PTuning
from graftwork.peft.adapter import Adapter, Birth
from graftwork.peft.artifact import directory as artifact
from graftwork.peft.sites import Host, Site
from graftwork.training import Layout
from tests.contracts.methods import STACKS, prompted, shake, tokens
from tests.helpers.distributed import run_ranks
from tests.parallel.layouts import Cell
from tests.parallel.models import model_of, write_checkpoints

TENSORS = "adapter_model.safetensors"
KEY = "lora.decoder.layers.3.mlp.linear_fc1.lora_A"
LAYOUTS: dict[str, tuple[int, Layout]] = {
    "tp2": (2, Layout(tensor_model_parallel_size=2)),
    "tp2_sp": (2, Layout(tensor_model_parallel_size=2, sequence_parallel=True)),
    "pp2": (2, Layout(pipeline_model_parallel_size=2)),
    "pp2_vpp2": (2, Layout(pipeline_model_parallel_size=2, virtual_pipeline_model_parallel_size=2)),
    "cp2": (2, Layout(context_parallel_size=2)),
    "dp2": (2, Layout()),
    "ep2": (2, Layout(expert_model_parallel_size=2)),
    "tp2_pp2": (4, Layout(tensor_model_parallel_size=2, pipeline_model_parallel_size=2)),
}


def base_for(layout: str) -> str:
    return "mixture" if layout == "ep2" else "llama"


def enter(layout: Layout) -> None:
    """Make the process groups of a layout."""
    parallel.initialize(layout)


def bare(base: str, root: Path, layout: Layout | None = None) -> GPT:
    """Return the base model, built in a layout as a trainer with that strategy would build it."""
    model = model_of(Cell(base, "full"), root)
    parallel.initialize(layout or Layout())
    model.configure_model()
    return model


def stacks() -> dict[str, Any]:
    """Return fresh stacks that together have every kind of tensor and cut."""
    chosen = {name: STACKS[name]() for name in ("lora", "lora+ia3", "all")}
    wide = LoRA("wide", dim=4, target_modules=["word_embeddings", "output_layer", "linear_fc1"])
    return {**chosen, "everywhere": [wide]}


def logits(model: GPT) -> Tensor:
    with torch.no_grad():
        return model(prompted(model, tokens()))


def reference(root: Path, base: str) -> dict[str, Tensor]:
    """Write an artifact of every stack with one process; return the logits."""
    found = {}
    for name, stack in stacks().items():
        model = bare(base, root)
        model.add_adapter(stack)
        shake(model, 0.05)
        model.save_adapters(root / base / f"one_{name}")
        found[name] = logits(model)
    return found


def repeated(model: GPT, path: Path) -> list[tuple[float, bool]]:
    """Repeat the proof of an artifact; return how far each view is from it, and whether adapters count in it."""
    return [(c.difference, c.effect > 1e-3 or not c.adapters) for c in model.verify_adapters(path)]


Found = dict[str, tuple[Tensor, list[tuple[float, bool]]]]


def reload(rank: int, world: int, layout: Layout, base: str, root: Path) -> Found:
    """Load what one process has saved, return logits and its proof's figures, save it again from this layout."""
    enter(layout)
    found = {}
    for name in stacks():
        model = bare(base, root, layout)
        model.load_adapters(root / base / f"one_{name}")
        found[name] = logits(model), repeated(model, root / base / f"one_{name}")
        model.save_adapters(root / base / f"many_{name}")
    return found


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = write_checkpoints(tmp_path_factory.mktemp("layouts"))
    (root / "mixture").mkdir()
    return root


@pytest.fixture(scope="module")
def references(root: Path) -> Any:
    found = {base: reference(root, base) for base in ("llama", "mixture")}
    parallel.destroy()
    return found


@pytest.mark.processes
@pytest.mark.parametrize("layout", LAYOUTS)
def test_saved_by_one_process_loaded_here_saved_here(layout: str, root: Path, references: Any) -> None:
    world, sizes = LAYOUTS[layout]
    base = base_for(layout)
    ranks = run_ranks(reload, world, sizes, base, root, timeout=300)
    for name, wanted in references[base].items():
        for found in ranks:
            assert (found[name][0] - wanted).abs().max() <= 1e-5 * wanted.abs().max(), name
            assert all(far <= 1e-5 and counts for far, counts in found[name][1]), (name, found[name][1])
        ours, theirs = (load_file(root / base / f"{who}_{name}" / TENSORS) for who in ("many", "one"))
        assert ours.keys() == theirs.keys(), name
        for key in ours:
            close = torch.allclose(ours[key], theirs[key], rtol=1e-6, atol=1e-6)  # a baked table is computed anew
            assert close if key.endswith(".table") else torch.equal(ours[key], theirs[key]), key
        model = bare(base, root)
        model.load_adapters(root / base / f"many_{name}")
        assert all(far <= 1e-5 and counts for far, counts in repeated(model, root / base / f"many_{name}")), name
    parallel.destroy()


class Picky(CanonicalAdapter):
    """Refuses a site that only the last pipeline stage has."""

    def build(self, site: Site, birth: Birth, host: Host) -> Adapter:
        """Build all but one."""
        if site.layer == 3:
            raise ConfigError("not here")
        return super().build(site, birth, host)


def refuse(rank: int, world: int, layout: Layout, root: Path) -> list[str]:
    """Meet every refusal in this layout; return the messages, and what is left of the model."""
    enter(layout)
    model = bare("llama", root, layout)
    before = [n for n, p in model.named_parameters() if p.requires_grad]
    attempts = [
        lambda: model.load_adapters(root / "nan"),
        lambda: model.load_adapters(root / "missing"),
        lambda: model.add_adapter([PTuning(virtual_tokens=2), LoRA(target_modules=["nope"])]),
        lambda: model.add_adapter(LoRA(target_modules=["layers.9.mlp.linear_fc1"])),
        lambda: model.add_adapter([IA3(), LoRA(rank_pattern={"layers.9.mlp.linear_fc1": 2})]),
    ]
    attempts.append(lambda: model.add_adapter(Picky(dim=4)))
    if layout.tensor_model_parallel_size > 1:
        attempts.append(lambda: model.add_adapter([PTuning(virtual_tokens=2), CanonicalAdapter(dim=7)]))
    messages = [_message(attempt) for attempt in attempts]
    assert before == [n for n, p in model.named_parameters() if p.requires_grad] and not model.prompt_layout.slots
    model.add_adapter([LoRA(dim=4), PTuning(virtual_tokens=2, embedding_dim=4, bottleneck_dim=4)])
    weights = [p.detach().clone() for p in model.parameters()]
    messages.append(_message(model.merge_adapters))
    assert all(torch.equal(p, w) for p, w in zip(model.parameters(), weights)) and not model.stack.merged
    blocked = root / "blocked"
    messages.append(_message(lambda: model.save_adapters(blocked)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(artifact, "save_file", _swapped)
        messages.append(_message(lambda: model.save_adapters(root / f"never_{world}")))
    if rank == 0:
        next(model.stack.adapters("lora")).lora_B.data.fill_(float("nan"))
    messages.append(_message(lambda: model.save_adapters(root / f"never_{world}")))
    messages.append(_message(lambda: model.merge_adapters(["lora"])))
    assert not model.stack.merged
    return messages


def _swapped(tensors: dict[str, Tensor], *where: Any, **options: Any) -> None:
    """Write the rows of one tensor in another order."""
    save_file({**tensors, KEY: tensors[KEY].flip(0)}, *where, **options)


def _message(attempt: Any) -> str:
    try:
        attempt()
    except GraftworkError as error:
        return str(error)
    raise AssertionError("this was to be refused")


@pytest.mark.processes
@pytest.mark.parametrize("layout", ["tp2", "pp2", "dp2"])
def test_all_ranks_refuse_together_and_none_hangs(layout: str, root: Path, references: Any) -> None:
    """One stage alone sees the unmatched target, the NaN or the prompt that cannot merge; rank 0 alone writes."""
    world, sizes = LAYOUTS[layout]
    for name, change in (("nan", _poison), ("missing", lambda path: (path / TENSORS).unlink())):
        if not (root / name).exists():
            (root / name).mkdir()
            for file in (root / "llama" / "one_lora").iterdir():
                (root / name / file.name).write_bytes(file.read_bytes())
            change(root / name)
    (root / "blocked").mkdir(exist_ok=True)
    (root / "blocked" / "notes.txt").write_text("mine")
    ranks = run_ranks(refuse, world, sizes, root, timeout=300)
    assert all(messages == ranks[0] for messages in ranks)
    for message, wanted in zip(
        ranks[0], ["holds NaN", "holds no adapter_model", "'nope'", "layers.9", "layers.9", "not here"]
    ):
        assert wanted in message
    *_, merge, blocked, unproved, nan, nan_merge = ranks[0]
    assert f"tensor {KEY!r} has other values" in unproved
    assert "PTuning 'ptuning' cannot be merged" in merge and "notes.txt" in blocked
    assert "not saved" in nan and "would hold NaN" in nan_merge
    assert not (root / f"never_{world}").exists()
    if layout == "tp2":
        assert "dim 7 is not a multiple of tensor_model_parallel_size 2" in ranks[0][6]


def _poison(path: Path) -> None:
    """Put NaN where only the last stage and the second tensor rank look."""
    tensors = load_file(path / TENSORS)
    tensors["lora.decoder.layers.3.mlp.linear_fc1.lora_B"][-1, 0] = float("nan")
    save_file(tensors, path / TENSORS)
    config = json.loads((path / "adapter_config.json").read_text())
    config["checksum"] = artifact._checksum(config, path / TENSORS)
    (path / "adapter_config.json").write_text(json.dumps(config))


def merge(rank: int, world: int, layout: Layout, root: Path) -> tuple[Tensor, Tensor, bool]:
    """Merge and unmerge in this layout: logits live, merged, and whether every bit came back."""
    enter(layout)
    model = bare("llama", root, layout)
    model.load_adapters(root / "llama" / "one_lora+ia3")
    base = [p.detach().clone() for p in model.parameters()]
    live = logits(model)
    model.merge_adapters()
    merged = logits(model)
    model.unmerge_adapters()
    return live, merged, all(torch.equal(p, b) for p, b in zip(model.parameters(), base))


@pytest.mark.processes
@pytest.mark.parametrize("layout", ["tp2_sp", "pp2"])
def test_merging_in_a_layout(layout: str, root: Path, references: Any) -> None:
    world, sizes = LAYOUTS[layout]
    for live, merged, restored in run_ranks(merge, world, sizes, root):
        wanted = references["llama"]["lora+ia3"]
        assert (merged - wanted).abs().max() <= 1e-5 * wanted.abs().max()
        assert (live - wanted).abs().max() <= 1e-5 * wanted.abs().max() and restored


def merge_each(rank: int, world: int, names: list[str], root: Path) -> dict[str, tuple[Tensor, bool]]:
    """Merge and unmerge stacks at tensor-parallel size 2: logits, and whether every bit came back."""
    layout = LAYOUTS["tp2_sp"][1]
    enter(layout)
    model, found = bare("llama", root, layout), {}
    for name in names:
        model.load_adapters(root / "merging" / name)
        before = [p.detach().clone() for p in model.parameters()]
        model.merge_adapters()
        merged = logits(model)
        model.unmerge_adapters()
        found[name] = merged, all(torch.equal(p, b) for p, b in zip(model.parameters(), before))
        for adapter in list(model.adapters):
            model.delete_adapter(adapter)
    return found


@pytest.mark.fault(
    "merging at tensor-parallel size 2 gives a wrong weight",
    "each rank merges its own cut; the whole equals one process, for each method that merges",
)
@pytest.mark.processes
def test_every_method_merges_its_cut_of_a_weight(root: Path) -> None:
    model, wanted = bare("llama", root), {}
    for name, stack in STACKS.items():
        model.add_adapter(stack())
        adapters = list(model.stack.adapters())
        if adapters and all(adapter.mergeable for adapter in adapters):
            shake(model, 0.05)
            model.save_adapters(root / "merging" / name)
            wanted[name] = logits(model)
        for adapter in list(model.adapters):
            model.delete_adapter(adapter)
    parallel.destroy()
    assert wanted.keys() >= {"lora", "ia3", "lora+ia3"}
    for found in run_ranks(merge_each, 2, list(wanted), root):
        assert found.keys() == wanted.keys()
        for name, (merged, restored) in found.items():
            assert (merged - wanted[name]).abs().max() <= 1e-5 * wanted[name].abs().max(), name
            assert restored, name


def experts(rank: int, world: int, layout: Layout, root: Path) -> list[str]:
    """Attach to one expert by its global number."""
    enter(layout)
    model = bare("mixture", root, layout)
    model.add_adapter(LoRA(dim=2, target_modules=["local_experts.3.linear_fc1"], layers=[1]))
    model.add_adapter(IA3(targets=["ffn"]))
    return [f"{name} {g.site.name}" for name, items in model.stack.grafted.items() for g in items]


@pytest.mark.fault(
    "experts change their numbers with the expert-parallel size",
    "names are global",
)
@pytest.mark.processes
def test_experts_have_one_name_in_every_layout(root: Path) -> None:
    alone = experts(0, 1, Layout(), root)
    parallel.destroy()
    first, second = run_ranks(experts, 2, LAYOUTS["ep2"][1], root)
    one = "lora decoder.layers.1.mlp.experts.local_experts.3.linear_fc1"
    assert one in second and one not in first
    assert sorted(first + second) == sorted(alone) and len(alone) == 1 + 2 * 4


def test_the_comparison_notices_a_part_that_is_missing(root: Path, references: Any) -> None:
    """An artifact with one rank's rows only, as another library has written it, is refused by its shape."""
    model = bare("llama", root)
    path = root / "half"
    path.mkdir()
    for file in (root / "llama" / "one_lora").iterdir():
        (path / file.name).write_bytes(file.read_bytes())
    tensors = load_file(path / TENSORS)
    key = "lora.decoder.layers.0.mlp.linear_fc1.lora_B"
    tensors[key] = tensors[key][: len(tensors[key]) // 2].contiguous()
    save_file(tensors, path / TENSORS)
    with pytest.raises(ArtifactError):
        model.load_adapters(path)
    parallel.destroy()


def thawed(rank: int, world: int, root: Path, trainable: bool) -> list[bool]:
    """Take off an adapter of the first layer alone; return whether this rank's base parameters train again."""
    model = bare("llama", root, Layout(pipeline_model_parallel_size=2))
    model.add_adapter(LoRA(dim=2, layers=[0]), trainable=trainable)
    held = any(True for _ in model.stack.tensors("lora"))
    model.delete_adapter("lora")
    return [held, any(p.requires_grad for p in model.parameters()), all(p.requires_grad for p in model.parameters())]


@pytest.mark.processes
@pytest.mark.parametrize("trainable", [True, False])
def test_a_stage_without_the_adapter_thaws_with_the_others(trainable: bool, root: Path) -> None:
    first, second = run_ranks(thawed, 2, root, trainable)
    assert (first[0], second[0]) == (True, False), "the adapter stands in the first stage alone"
    assert first[1:] == second[1:] == [trainable, trainable]
