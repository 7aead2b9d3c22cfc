"""Merged equals unmerged, unmerging gives the bits back, and what cannot be merged changes nothing."""

import pytest
import torch

from graftwork.errors import ArtifactError, MatchError
from graftwork.peft import IA3, LoRA
from tests.contracts.methods import STACKS, base_values, every_family, make, prompted, same, shake, tokens

MERGEABLE = ["lora", "ia3", "lora+ia3", "ia3+lora", "dora", "canonical_lora", "lora's relatives"]
every_mergeable = pytest.mark.parametrize("stack", MERGEABLE)


@pytest.fixture(autouse=True)
def no_gradients():
    with torch.no_grad():
        yield


def stack_for(family: str, stack: str) -> list:
    transforms = STACKS[stack]()
    if family == "qk_norm":  # behind the norm of keys IA3 has no weight to be folded into
        transforms = [IA3(key_position="pre_norm") if isinstance(t, IA3) else t for t in transforms]
    return transforms


@every_family
@every_mergeable
def test_merged_equals_unmerged(family: str, stack: str) -> None:
    model = make(family)
    model.add_adapter(stack_for(family, stack))
    shake(model, 0.05)
    base, live = base_values(model), model(tokens())
    model.merge_adapters()
    merged, weights = model(tokens()), base_values(model)
    assert not same(weights, base)
    assert (merged - live).abs().max() <= 1e-5 * live.abs().max()
    model.merge_adapters()
    assert same(base_values(model), weights), "merging twice is merging once"
    model.unmerge_adapters()
    assert same(base_values(model), base) and torch.equal(model(tokens()), live)
    model.unmerge_adapters()
    assert same(base_values(model), base)


@every_mergeable
def test_merging_one_after_another_equals_merging_all(stack: str) -> None:
    model = make()
    model.add_adapter(STACKS[stack]())
    shake(model, 0.05)
    live = model(tokens())
    for name in model.adapters:
        model.merge_adapters([name])
        assert (model(tokens()) - live).abs().max() <= 1e-5 * live.abs().max()
    model.unmerge_adapters()
    assert torch.equal(model(tokens()), live)


@pytest.mark.fault(
    "merging in bf16 loses the adapter's small values",
    "the sum is made in fp32 and rounded once",
)
def test_merging_computes_in_fp32_for_a_bf16_base() -> None:
    model = make(dtype="bf16")
    model.add_adapter(LoRA(dim=4))
    shake(model, 0.05)
    wrapper = model.module.decoder.layers[0].mlp.linear_fc2
    adapter = wrapper.adapters["lora"]
    wanted = (wrapper.weight.float() + 8 * (adapter.lora_B @ adapter.lora_A)).bfloat16()
    model.merge_adapters()
    assert torch.equal(wrapper.weight, wanted) and wrapper.weight.is_contiguous()


@pytest.mark.parametrize(
    ("family", "stack", "message"),
    [
        ("llama", "canonical", "CanonicalAdapter 'canonical_adapter' cannot be merged at .*: it is not linear"),
        ("llama", "ptuning", "PTuning 'ptuning' cannot be merged at .*: virtual tokens are rows"),
        ("llama", "lora+canonical", "CanonicalAdapter 'canonical_adapter' cannot be merged"),
        ("llama", "all", "CanonicalAdapter 'canonical_adapter' cannot be merged"),
        ("qk_norm", "ia3", "IA3 'ia3' cannot be merged at .*k_layernorm: .*pre_norm"),
    ],
)
def test_what_cannot_be_merged_changes_nothing(family: str, stack: str, message: str) -> None:
    model = make(family)
    model.add_adapter(STACKS[stack]())
    shake(model, 0.05)
    ids = prompted(model, tokens())
    base, live = base_values(model), model(ids)
    with pytest.raises(MatchError, match=message):
        model.merge_adapters()
    assert same(base_values(model), base) and torch.equal(model(ids), live) and not model.stack.merged


def test_an_inner_adapter_cannot_stay_live() -> None:
    model = make()
    model.add_adapter([IA3(), LoRA(dim=4)])
    shake(model, 0.05)
    base = base_values(model)
    with pytest.raises(MatchError, match="LoRA 'lora' cannot be merged at .*: an inner adapter would stay live"):
        model.merge_adapters(["lora"])
    assert same(base_values(model), base)


@pytest.mark.fault(
    "an adapter with NaN is merged into the base",
    "values that are not finite are refused, the base stays",
)
@pytest.mark.parametrize("stack", ["lora", "ia3"])
def test_nan_is_not_merged(stack: str) -> None:
    model = make()
    model.add_adapter(STACKS[stack]())
    last = list(list(model.stack.adapters())[-1].parameters())[-1]
    last.view(-1)[0] = float("nan")
    base = base_values(model)
    with pytest.raises(MatchError, match="its weight would hold NaN or Inf"):
        model.merge_adapters()
    assert same(base_values(model), base) and not model.stack.merged


def test_a_merged_stack_is_neither_deleted_nor_filled(tmp_path) -> None:
    model = make()
    model.add_adapter(STACKS["lora+ia3"]())
    shake(model, 0.05)
    model.save_adapters(tmp_path / "adapter")
    model.merge_adapters(["lora"])
    merged = model(tokens())
    with pytest.raises(MatchError, match="unmerge first"):
        model.delete_adapter("ia3")
    with pytest.raises(ArtifactError, match="'lora' is merged into the base"):
        model.load_adapters(tmp_path / "adapter")
    assert torch.equal(model(tokens()), merged) and list(model.adapters) == ["lora", "ia3"]


def test_unknown_names_are_refused() -> None:
    model = make()
    model.add_adapter(STACKS["lora"]())
    with pytest.raises(MatchError, match=r"no adapter 'lara'; did you mean 'lora'\?"):
        model.merge_adapters(["lara"])


def test_adapters_added_to_a_merged_base_are_live() -> None:
    model = make()
    model.add_adapter(STACKS["lora"]())
    shake(model, 0.05)
    live = model(tokens())
    model.merge_adapters()
    model.add_adapter(STACKS["ia3"]())
    shake(model, 0.05, only="ia3")
    both = model(tokens())
    assert (both - live).abs().max() > 1e-3
    model.unmerge_adapters()
    assert (model(tokens()) - both).abs().max() <= 1e-5 * both.abs().max()
