"""Several adapters made one: against the dense sum of their updates, and against PEFT's ``add_weighted_adapter``."""

import json
from collections import defaultdict
from copy import deepcopy
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from graftwork import models
from graftwork.errors import GraftworkError
from graftwork.models.merging import Blend, combine, combine_directories, merge_combined
from graftwork.peft import (
    IA3,
    PEFT,
    CanonicalAdapter,
    CanonicalLoRA,
    DoRA,
    LoRA,
    PromptTuning,
    PTuning,
    Selective,
)
from graftwork.peft.artifact.directory import opened
from tests.contracts.methods import make, shake
from tests.exchange.desk import EVERY, Desk
from tests.exchange.test_merged_directory import identical, oracle, tensors
from tests.exchange.test_peft_in import config_of
from tests.helpers.tiny_hf import make_tiny

TENSORS = "adapter_model.safetensors"
WEIGHTS = [0.7, -0.4]


@pytest.fixture(scope="module", params=EVERY)
def desk(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Desk:
    return Desk(request.param, tmp_path_factory.mktemp(request.param) / "hf")


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Desk:
    return Desk("llama", tmp_path_factory.mktemp("llama") / "hf")


def saved(desk: Desk, directory: Path, *transforms: PEFT) -> list[Path]:
    """Save each of these, moved by noise of its own, in a directory of its own."""
    paths = []
    for number, transform in enumerate(transforms):
        model = desk.grafted(transform)
        shake(model, 0.03 * (number + 1))
        paths.append(directory / f"{transform.name}_{number}")
        model.save_adapters(paths[-1])
    return paths


def dense(path: Path, scale: float = 1.0, turned: bool = False) -> dict[str, Tensor]:
    """Return scale * B A of every update of an artifact in fp64, by its place and name."""
    held = {key.partition(".")[2]: tensor.double() for key, tensor in load_file(path / TENSORS).items()}
    stems = sorted(key.removesuffix("lora_A") for key in held if key.endswith("lora_A"))
    found = {}
    for stem in stems:
        low, high = held[f"{stem}lora_A"], held[f"{stem}lora_B"]
        found[stem] = scale * (low @ high.T if "word_embeddings" in stem else high @ low)
    return found


def summed(parts: list[tuple[float, dict[str, Tensor]]]) -> dict[str, Tensor]:
    """Return the weighted sum by place, of whatever stands there."""
    found: dict[str, Tensor] = defaultdict(lambda: torch.zeros(()))
    for weight, part in parts:
        for stem, tensor in part.items():
            found[stem] = found[stem] + weight * tensor
    return found


def close(found: dict[str, Tensor], wanted: dict[str, Tensor], tolerance: float = 1e-6) -> bool:
    """Tell whether updates are equal, relative to the largest value of each."""
    assert found.keys() == wanted.keys()
    return all((found[s] - wanted[s]).abs().max() <= tolerance * wanted[s].abs().max() for s in wanted)


PAIRS: dict[str, tuple[PEFT, PEFT, float, float]] = {
    "lora": (LoRA("a", dim=4, alpha=8), LoRA("b", dim=3, alpha=9), 2.0, 3.0),
    "other targets": (
        LoRA("a", dim=2, alpha=2, target_modules=["linear_fc1"]),
        LoRA("b", dim=4, alpha=4, use_rslora=True, layers=[1]),
        1.0,
        2.0,
    ),
    "canonical": (CanonicalLoRA("a", dim=4, alpha=8), CanonicalLoRA("b", dim=2, alpha=3, layers=[0]), 2.0, 1.5),
    "canonical parts": (
        CanonicalLoRA("a", dim=4, alpha=8, target_modules=["linear_q", "linear_fc1_up"]),
        CanonicalLoRA("b", dim=4, alpha=4, target_modules=["linear_v"]),
        2.0,
        1.0,
    ),
}


@pytest.mark.parametrize("pair", PAIRS)
def test_side_by_side_is_the_weighted_sum(pair: str, desk: Desk, tmp_path: Path) -> None:
    first, second, one, other = PAIRS[pair]
    paths = saved(desk, tmp_path, first, second)
    combine_directories(paths, tmp_path / "both", Blend(WEIGHTS, name="both"))
    wanted = summed([(w, dense(p, s)) for w, p, s in zip(WEIGHTS, paths, (one, other))])
    assert close(dense(tmp_path / "both"), wanted)
    assert not close(dense(tmp_path / "both"), summed([(1.0, wanted), (1e-4, wanted)]))  # the comparison can fail
    model = desk.clear()
    model.load_adapters(tmp_path / "both")
    assert desk.changes(desk.logits(model.eval())) and list(model.adapters) == ["both"]


@pytest.mark.parametrize("rank", [None, 2, 5, 100])
def test_the_nearest_of_a_rank(rank: int | None, llama: Desk, tmp_path: Path) -> None:
    paths = saved(llama, tmp_path, LoRA("a", dim=4, alpha=8), LoRA("b", dim=3, alpha=9, layers=[1, 2]))
    combine_directories(paths, tmp_path / "both", Blend(WEIGHTS, "svd", rank))
    found = dense(tmp_path / "both")
    for stem, whole in summed([(w, dense(p, s)) for w, p, s in zip(WEIGHTS, paths, (2.0, 3.0))]).items():
        there = 7 if "layers.1." in stem or "layers.2." in stem else 4
        kept = min(rank or 4, there)
        assert load_file(tmp_path / "both" / TENSORS)[f"a.{stem}lora_A"].shape[0] == kept
        U, S, V = torch.linalg.svd(whole)
        nearest = U[:, :kept] * S[:kept] @ V[:kept]
        assert (found[stem] - nearest).abs().max() <= 1e-6 * whole.abs().max()
    model = llama.clear()
    model.load_adapters(tmp_path / "both")


@pytest.mark.parametrize("weights", [[0.7, 0.3], WEIGHTS], ids=["positive", "negative"])
@pytest.mark.parametrize("way", ["linear", "cat", "svd"])
def test_adapters_of_peft_are_combined_as_peft_does(way: str, weights: list[float], desk: Desk, tmp_path: Path) -> None:
    theirs = peft.PeftModel.from_pretrained(_made(desk, tmp_path / "a", 11), tmp_path / "a", adapter_name="a")
    _made(desk, tmp_path / "b", 12)
    theirs.load_adapter(tmp_path / "b", "b")
    theirs.add_weighted_adapter(["a", "b"], weights, "both", combination_type=way)
    theirs.set_adapter("both")
    paths = [tmp_path / "a", tmp_path / "b"]
    combine_directories(paths, tmp_path / "both", Blend(weights, way), desk.directory)
    model = desk.clear()
    model.load_adapters(tmp_path / "both")
    wanted = desk.logits(theirs.eval())
    assert desk.changes(wanted) and desk.same(desk.logits(model.eval()), wanted)


def _made(desk: Desk, directory: Path, seed: int) -> Any:
    """Save an adapter of PEFT whose values depend on ``seed``, and return a fresh base."""
    config = config_of("lora", desk.family)
    config.r, config.lora_alpha = 4, 4 * seed
    torch.manual_seed(seed)  # PEFT draws A from the global generator; singular values that are close would be swapped
    model = peft.get_peft_model(deepcopy(desk.base), config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.03 * torch.randn(parameter.shape, generator=generator))
    model.save_pretrained(directory)
    return deepcopy(desk.base)


@pytest.mark.parametrize("way", ["linear", "cat", "svd"])
def test_a_merged_model_of_several_is_that_of_their_combination(way: str, llama: Desk, tmp_path: Path) -> None:
    paths = saved(llama, tmp_path, LoRA("a", dim=4, alpha=8), LoRA("b", dim=4))
    blend = Blend(WEIGHTS, way)
    combine_directories(paths, tmp_path / "both", blend)
    merge_combined(paths, tmp_path / "merged", blend, llama.directory)
    model = llama.clear()
    model.load_adapters(tmp_path / "both")
    wanted = llama.logits(model.eval())
    assert llama.changes(wanted)
    assert llama.same(llama.logits(oracle(llama, tmp_path / "merged")), wanted)
    model.merge_adapters()
    model.export_hf(tmp_path / "exported")
    model.unmerge_adapters()
    assert identical(tensors(tmp_path / "merged"), tensors(tmp_path / "exported"))


def test_an_adapter_and_its_negative_are_nothing(llama: Desk, tmp_path: Path) -> None:
    (path,) = saved(llama, tmp_path, LoRA("a", dim=4))
    combine_directories([path, path], tmp_path / "none", Blend([1, -1], "svd"))
    assert max(change.abs().max() for change in dense(tmp_path / "none").values()) < 1e-7


def test_embeddings_are_combined(tmp_path: Path) -> None:
    desk = Desk("llama_tied", tmp_path / "hf")
    targets = ["word_embeddings", "linear_proj"]
    paths = saved(desk, tmp_path, *(LoRA(name, dim=4, alpha=8, target_modules=targets) for name in "ab"))
    for way in ("cat", "svd"):
        combine_directories(paths, tmp_path / way, Blend(WEIGHTS, way, 8 if way == "svd" else None))
        wanted = summed([(w, dense(p, 2.0)) for w, p in zip(WEIGHTS, paths)])
        assert close(dense(tmp_path / way), wanted)
        desk.clear().load_adapters(tmp_path / way)


def test_what_stays_with_the_result(llama: Desk, tmp_path: Path) -> None:
    """Base, dropout and templates, where the adapters agree; training goes on."""
    paths = []
    for name, template in (("a", "{text}"), ("b", "{text}"), ("c", "Say: {text}")):
        model = llama.grafted(LoRA(name, dim=2, dropout=0.1))
        model.stack.prompt_formats[name] = {"prompt_template": template}
        paths.append(tmp_path / name)
        model.save_adapters(paths[-1])
    combine_directories(paths[:2], tmp_path / "ab", Blend([1, 1], name="ab"))
    combine_directories(paths, tmp_path / "abc", Blend([1, 1, 1], name="abc"))
    with opened(tmp_path / "ab") as same, opened(tmp_path / "abc") as other, opened(paths[0]) as first:
        assert same.config.base == other.config.base == first.config.base
        assert same.config.adapters[0].prompt.prompt_template == "{text}"
        assert other.config.adapters[0].prompt.prompt_template is None
        assert same.config.adapters[0].hyperparameters["dropout"] == 0.1
    model = llama.clear()
    model.load_adapters(tmp_path / "ab")
    assert all(t.parameter.requires_grad for t in model.stack.tensors("ab"))


@pytest.mark.fault(
    "a combination of adapters forgets a scale or a weight's sign, and is another function than the sum",
    "it is compared with the dense sum of the updates, and with what PEFT makes of the same adapters",
)
@pytest.mark.parametrize("mistake", ["no scale", "no sign"])
def test_the_comparison_notices_a_mistake(
    mistake: str, llama: Desk, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = saved(llama, tmp_path, LoRA("a", dim=4, alpha=8), LoRA("b", dim=4, alpha=8))
    stacked = combine.WAYS["cat"]
    spoilt = {
        "no scale": lambda weighted, blend: stacked([(w / u.scale, u) for w, u in weighted], blend),
        "no sign": lambda weighted, blend: stacked([(abs(w), u) for w, u in weighted], blend),
    }
    monkeypatch.setattr(combine, "WAYS", {"cat": spoilt[mistake]})
    combine_directories(paths, tmp_path / "both", Blend(WEIGHTS))
    assert not close(dense(tmp_path / "both"), summed([(w, dense(p, 2.0)) for w, p in zip(WEIGHTS, paths)]))


NO_SUMS: dict[str, PEFT] = {
    transform.name: transform
    for transform in (
        DoRA(dim=4),
        IA3(),
        PromptTuning(init="random"),
        PTuning(virtual_tokens=2, embedding_dim=6, bottleneck_dim=6),
        CanonicalAdapter(dim=4),
        Selective(patterns=["norm"]),
    )
}
"""What is no sum of low-rank updates, by name."""


@pytest.fixture(scope="module")
def shelf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a directory with adapters of several methods, and of two bases."""
    root = tmp_path_factory.mktemp("shelf")
    for base, seed in (("base", 0), ("other", 1)):
        model = models.load(make_tiny("llama", root / base, seed=seed))
        model.add_adapter([LoRA("lora", dim=4), LoRA("second", dim=2)])
        model.save_adapters(root / f"{base}_lora", names=["lora"])
        model.save_adapters(root / f"{base}_two")
        model.add_adapter([*NO_SUMS.values(), CanonicalLoRA(dim=4), LoRA("r8", dim=8)])
        for name in (*NO_SUMS, "canonical_lora", "r8"):
            model.save_adapters(root / name, names=[name])
    model = make()
    model.add_adapter(LoRA(dim=4))
    model.save_adapters(root / "random")
    model.export_adapters(root / "peft")
    return root


ONE = "base_lora"
BAD: dict[str, tuple[list[str], dict[str, Any], str]] = {
    "no adapters": ([], {"weights": []}, "adapters is empty; name at least one"),
    "a weight too few": ([ONE, ONE], {"weights": [1.0]}, "weights has 1 value.s. for 2 adapter.s.; give one for each"),
    "a weight that is none": ([ONE], {"weights": [float("nan")]}, "weights holds nan; numbers are valid"),
    "a word as weight": ([ONE], {"weights": ["half"]}, "weights holds 'half'; numbers are valid"),
    "another way": ([ONE], {"weights": [1.0], "combine": "tie"}, "combine is 'tie'; .*cat, linear, svd"),
    "a rank for cat": ([ONE], {"weights": [1.0], "rank": 2}, "rank=2 counts only with combine='svd', got 'cat'"),
    "no rank": ([ONE], {"weights": [1.0], "combine": "svd", "rank": 0}, "rank is 0; a whole number from 1"),
    "several in one": (["base_two"], {"weights": [1.0]}, "holds several adapters .'lora', 'second'.; pick one"),
    "a name too few": ([ONE, ONE], {"weights": [1, 1], "names": ["lora"]}, "names has 1 value.s. for 2 adapter.s."),
    "an unknown name": ([ONE], {"weights": [1], "names": ["lorra"]}, "has no adapter 'lorra'; did you mean 'lora'"),
    "other bases": ([ONE, "other_lora"], {"weights": [1, 1]}, "belong to different bases .base and other, whose w"),
    "a random base": (["base_lora", "random"], {"weights": [1, 1]}, "belong to different bases"),
    **{
        type(t).__name__: ([name], {"weights": [1]}, f"{t} cannot be combined: it is no sum of low-rank updates")
        for name, t in NO_SUMS.items()
    },
    "two methods": (["other_lora", "canonical_lora"], {"weights": [1, 1]}, "cannot be combined: one has a pair of fac"),
    "ranks of factors": (
        ["other_lora", "r8"],
        {"weights": [1, 1], "combine": "linear"},
        "linear' adds factors of one rank, but at decoder.layers.0.* they have 4 and 8; choose",
    ),
    "no base for PEFT's": (["peft"], {"weights": [1]}, "which is not here; name its checkpoint with base="),
    "values that grow too large": ([ONE], {"weights": [1e300]}, "tensor 'lora.* holds NaN or Inf"),
    "no adapter": (["nowhere"], {"weights": [1]}, "There is no adapter directory"),
    "a name that cannot be": ([ONE], {"weights": [1], "name": "a.b"}, "name"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_cannot_be_combined_is_refused_in_one_sentence(case: str, shelf: Path, tmp_path: Path) -> None:
    adapters, given, message = BAD[case]
    with pytest.raises(GraftworkError, match=message) as caught:
        combine_directories([shelf / name for name in adapters], tmp_path / "out", Blend(**given))
    assert "\n" not in str(caught.value) and not list(tmp_path.iterdir())


def test_nothing_but_an_adapter_is_replaced(shelf: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "notes.txt").write_text("mine")
    with pytest.raises(GraftworkError, match=r"holds 'notes.txt' and is no adapter directory"):
        combine_directories([shelf / ONE], tmp_path / "out", Blend([1]))
    with pytest.raises(GraftworkError, match="is there already; name a new directory"):
        merge_combined([shelf / ONE], tmp_path / "out", Blend([1]), shelf / "base")
    assert [p.name for p in tmp_path.rglob("*")] == ["out", "notes.txt"]
    combine_directories([shelf / ONE], tmp_path / "new", Blend([1]))
    combine_directories([shelf / ONE], tmp_path / "new", Blend([2]))
    assert json.loads((tmp_path / "new" / "adapter_config.json").read_text())["step"] is None
